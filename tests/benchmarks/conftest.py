"""Undoes what a benchmark sets up in the process of the tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def programs_are_stored_again() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)
