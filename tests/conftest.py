"""Sets up eight CPU devices and quick compilation before any test imports jax."""

import os
import pathlib
import sys
import tempfile

# main.py and configs/ are run from the checkout and not installed; tests/ has helpers.
_TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import compiling  # noqa: E402

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = compiling.flags(devices=8)

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Programs are cached, so that no later test and no restart of a run compiles them again.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="programs")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
