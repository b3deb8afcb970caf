"""A transformer block: attention and MLP on residual branches, with stochastic depth."""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convit_jax.model.attention import Grid
from convit_jax.model.positional import Linear

Array = jax.Array


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: (..., D) -> (..., D)."""

    hidden: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width = x.shape[-1]
        x = Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        x = gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Linear(width, dtype=self.dtype, name="fc2")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def gelu(x: Array) -> Array:
    """x Phi(x), exact, computed in float32 (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    By erf, as PyTorch does; jax.nn.gelu takes erfc, which costs half as much again, forward and
    backward. The two differ by rounding only: 1 + erf loses digits where x Phi(x) is all but 0.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each on a residual branch.

    Attributes:
      attention: makes the attention module; called with a name.
      mlp_ratio: hidden width of the MLP over D.
      dropout: rate inside the MLP.
      use_drop_path: whether a rate of stochastic depth may be other than 0.
      dtype: of the matrix products and the residual stream.
    """

    attention: Callable[..., nn.Module]
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    use_drop_path: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, drop_path: Array, grid: Grid, train: bool, return_attention: bool
    ) -> tuple[Array, dict[str, Array]]:
        """(B, N, D) -> the same, and the attention's maps or {}. `drop_path`: this layer's rate.

        Attention from fewer tokens gives those alone.
        """
        # The two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large.
        norm = functools.partial(
            nn.LayerNorm, epsilon=1e-6, use_fast_variance=False, dtype=self.dtype
        )

        def residual(x: Array, branch: Array) -> Array:
            if train and self.use_drop_path:
                branch = drop_samples(branch, drop_path, self.make_rng("dropout"))
            return x + branch

        branch = self.attention(name="attn")(norm(name="norm1")(x), grid, train, return_attention)
        branch, maps = branch if return_attention else (branch, {})
        x = residual(x[:, : branch.shape[1]], branch)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        branch = Mlp(hidden, self.dropout, self.dtype, name="mlp")(norm(name="norm2")(x), train)
        return residual(x, branch), maps


def drop_samples(branch: Array, rate: Array, rng: Array) -> Array:
    """Stochastic depth: zeroes the branch of whole samples, scales the rest by 1 / (1 - rate).

    Huang et al. 2016 (arXiv:1603.09382), per sample as in timm's DropPath.

    Args:
      branch: (B, ...).
      rate: scalar in [0, 1), probability of zeroing.
      rng: a key; every sample is drawn alone.
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    return jnp.where(keep, branch / (1.0 - rate).astype(branch.dtype), 0)
