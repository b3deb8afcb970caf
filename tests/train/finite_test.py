"""The check of a state before it is saved."""

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.train.finite import all_finite


def test_one_bad_number_anywhere_is_found():
    tree = {
        "small": jnp.ones((3, 4)),
        "half": jnp.full(5, 1e38, jnp.bfloat16),
        "large": jnp.ones((300, 300)),
        "larger": jnp.ones((2, 200, 300)),
        "step": jnp.int32(7),
    }
    assert all_finite(tree)
    assert all_finite({"large": tree["large"], "step": tree["step"]})
    for name in ("small", "half", "large", "larger"):
        for bad in (np.nan, np.inf, -np.inf):
            last = (-1,) * tree[name].ndim
            assert not all_finite(tree | {name: tree[name].at[last].set(bad)}), (name, bad)


def test_a_state_of_many_arrays_takes_few_reductions():
    """Each reduction is compiled on its own, which took 2 s at the start of a run of the digits."""
    tree = [jax.ShapeDtypeStruct((2, size), jnp.float32) for size in range(1, 60)]
    text = jax.jit(all_finite).lower(tree).as_text()
    assert 1 <= text.count("stablehlo.reduce(") <= 2
