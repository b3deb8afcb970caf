"""A transformer block: attention and MLP on residual branches, with stochastic depth.

Shapes: B batch, N tokens (or patches), H heads, D width.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from convit_jax.model.attention import Grid
from convit_jax.model.linear import linear_over_tokens

Array = jax.Array

# Reduces the attention maps of one layer, by name, to other arrays.
MapsFunction = Callable[[Mapping[str, Array]], Any]


class Returned(NamedTuple):
    """What a block returns besides its output.

    Attributes:
      attention: whether to return the maps of the attention; or a function of them, whose result is
        returned in their place.
      tokens: whether to return the output once more: a scan stacks its second result only.
    """

    attention: bool | MapsFunction = False
    tokens: bool = False


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: (..., D) -> (..., D).

    Attributes:
      hidden: width between the two layers.
      dropout: dropout rate after the GELU and after the second layer.
      flat_tokens: see `ConViT`.
      dtype: dtype of the matrix products.
    """

    hidden: int
    dropout: float = 0.0
    flat_tokens: bool | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width = x.shape[-1]
        linear = functools.partial(linear_over_tokens(self.flat_tokens), dtype=self.dtype)
        x = linear(self.hidden, name="fc1")(x)
        x = gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = linear(width, name="fc2")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def gelu(x: Array) -> Array:
    """Returns the exact GELU, x Phi(x) (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Computes in float32 and returns the dtype of `x`, which has any shape.

    Uses erf, as PyTorch does. jax.nn.gelu uses erfc, which costs half as much again, forward and
    backward. The two differ by rounding only: 1 + erf loses digits where x Phi(x) is close to 0.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each on a residual branch.

    Attributes:
      attention: constructor of the attention module; called with `name`.
      mlp_ratio: hidden width of the MLP divided by D.
      dropout: dropout rate in the MLP.
      use_drop_path: whether stochastic depth is used in training. False ignores the rate.
      flat_tokens: see `ConViT`; of the MLP.
      dtype: dtype of the matrix products and the residual stream.
    """

    attention: Callable[..., nn.Module]
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    use_drop_path: bool = False
    flat_tokens: bool | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        drop_path: Array,
        offset: Array | None,
        grid: Grid,
        train: bool,
        returned: Returned,
    ) -> tuple[Array, dict[str, Any]]:
        """Applies the block.

        Args:
          x: (B, N, D).
          drop_path: scalar, rate of stochastic depth in this layer.
          offset: (B, H, N, N), added to the attention map, or None.
          grid: (R, C), rows and columns of the patch grid.
          train: whether dropout and stochastic depth are on.
          returned: what the second result has.

        Returns:
          (B, N, D), and a dictionary with the entries of `returned` that are asked for. An
          attention with `queries` set returns fewer tokens, and the block then returns these only.
        """
        # The fast variance, E[x^2] - E[x]^2, loses digits by cancellation where the mean is large.
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)

        def normed(x: Array, name: str) -> Array:
            return norm(name=name)(x.astype(jnp.float32)).astype(self.dtype)

        def residual(x: Array, branch: Array) -> Array:
            if train and self.use_drop_path:
                branch = drop_samples(branch, drop_path, self.make_rng("dropout"))
            return x + branch

        attention, with_maps = self.attention(name="attn"), bool(returned.attention)
        branch = attention(normed(x, "norm1"), grid, train, with_maps, offset)
        branch, maps = branch if with_maps else (branch, {})
        x = residual(x[:, : branch.shape[1]], branch)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        mlp = Mlp(hidden, self.dropout, self.flat_tokens, self.dtype, name="mlp")
        branch = mlp(normed(x, "norm2"), train)
        x = residual(x, branch)
        found: dict[str, Any] = {"tokens": x} if returned.tokens else {}
        if with_maps:
            found["attention"] = returned.attention(maps) if callable(returned.attention) else maps
        return x, found


def drop_samples(branch: Array, rate: Array, rng: Array) -> Array:
    """Zeroes the branch of random samples and scales the others by 1 / (1 - rate).

    This is stochastic depth (Huang et al. 2016, arXiv:1603.09382), drawn for each sample as in
    timm's DropPath.

    Args:
      branch: (B, ...).
      rate: scalar in [0, 1), the probability that a sample is zeroed.
      rng: random key.
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    return jnp.where(keep, branch / (1.0 - rate).astype(branch.dtype), 0)
