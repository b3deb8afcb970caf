"""Eight CPU devices, set before the first import of jax, for every test."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

# main.py and configs/ are run from the checkout and not installed; tests/ has helpers.
_TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
