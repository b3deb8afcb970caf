"""Linear layers over tokens: (..., D) -> (..., F)."""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax

Array = jax.Array

# The reference code truncates N(0, 0.02^2) at +-2. That is 100 standard deviations, so a plain
# normal is the same. (Initialisers that truncate at 2 sigma have another distribution.)
linear_init = nn.initializers.normal(0.02)
Linear = functools.partial(nn.Dense, kernel_init=linear_init)


def choose_flat(flat_tokens: bool | None, backend: str | None = None) -> bool:
    """Returns `ConViT.flat_tokens`, with None replaced by the choice for the backend.

    Args:
      flat_tokens: whether linear layers see images and tokens as one axis; None means True on
        a CPU.
      backend: "cpu", "gpu" or "tpu"; None means JAX's default backend.
    """
    return (backend or jax.default_backend()) == "cpu" if flat_tokens is None else flat_tokens


def linear_over_tokens(flat_tokens: bool | None) -> Callable[..., nn.Dense]:
    """Returns the constructor of a linear layer, with images and tokens as one axis or as two.

    Both compute the same function at different cost. The gradient of the kernel is a sum over
    images and tokens. Over two axes, XLA's CPU backend writes the output's gradient out transposed
    first. On a TPU, one axis costs copies between layouts instead.
    """
    if not choose_flat(flat_tokens):
        return Linear
    return functools.partial(Linear, dot_general=_flat_dot)


def _flat_dot(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """Returns x times kernel: (..., D), (D, F) -> (..., F), as `nn.Dense.dot_general`."""
    del dimension_numbers  # nn.Dense's: the last axis of x, the first of the kernel
    out = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, **options)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])
