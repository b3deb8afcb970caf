"""Sets up eight CPU devices and quick compilation before any test imports jax."""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far longer than they compute, and LLVM's optimisation takes two thirds of that time.
# It is off here. What the tests look at does not change: fusions, collectives and memory are the
# work of XLA's own passes. The runs of cli/train_test.py and cli/data_test.py compile as a user's.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

# main.py and configs/ are run from the checkout and not installed; tests/ has helpers.
_TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Programs are cached, so that no later test and no restart of a run compiles them again.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="programs")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
