"""Linear layers over tokens, with images and tokens as one axis or as two."""

import jax
import jax.numpy as jnp
import pytest

from convit_jax.model.linear import choose_flat, linear_over_tokens


@pytest.mark.parametrize(("flat", "sums"), [(True, "[0] x [0]"), (False, "[0, 1] x [0, 1]")])
def test_the_gradient_of_a_kernel_sums_over_one_axis_or_two(flat, sums):
    """Over two axes XLA's CPU backend writes out a transposed copy first."""
    x, layer = jnp.ones((2, 3, 4)), linear_over_tokens(flat)(5)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda variables: layer.apply(variables, x).sum()))
    assert f"contracting_dims = {sums}" in gradient.lower(variables).as_text()


def test_tokens_are_flat_on_a_cpu_unless_told_otherwise():
    assert choose_flat(None) == (jax.default_backend() == "cpu")
    assert [choose_flat(None, backend) for backend in ("cpu", "gpu", "tpu")] == [True, False, False]
    assert [choose_flat(True, "tpu"), choose_flat(False, "cpu")] == [True, False]
