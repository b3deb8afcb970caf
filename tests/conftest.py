"""Eight CPU devices, and programs that compile quickly, set before jax is imported by any test."""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far longer than they compute. LLVM's optimisation takes two thirds of that, and
# changes nothing of what they look at: XLA's own passes, so fusions, collectives and memory, stay.
# The runs of main_test.py and imagenet_test.py are compiled as a user's are.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

# main.py and configs/ are run from the checkout and not installed; tests/ has helpers.
_TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# A program that an earlier test compiled, or an earlier start of a run, is not compiled again.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="programs")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
