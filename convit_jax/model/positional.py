"""The positional half of GPSA, softmax_j(w . r_ij), factorised over rows and columns.

Shapes: B batch, N patches, H heads, K width of a head, R rows and C columns of the patch grid,
N = R C.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convit_jax.model.linear import linear_init

Array = jax.Array

Grid = tuple[int, int]


def positional_factors(kernel: Array, grid: Grid) -> tuple[Array, Array]:
    """Returns the row and column factors of the positional attention, P = P_y (x) P_x.

    Scores and softmax are float32. bfloat16 does not represent every integer above 256, and
    dx^2 + dy^2 exceeds 256 on a grid as small as 14 x 14.

    Args:
      kernel: (3, H), the weights of dx, dy and dx^2 + dy^2 for every head.
      grid: (R, C), the patch grid.

    Returns:
      P_y (H, R, R) and P_x (H, C, C), float32, indexed [head, query, key]; every row
      sums to 1.
    """
    wx, wy, wd = kernel.astype(jnp.float32)[:, :, None, None]

    def factor(linear: Array, size: int) -> Array:
        position = jnp.arange(size, dtype=jnp.float32)
        offset = (position[None, :] - position[:, None])[None]  # key minus query
        return jax.nn.softmax(linear * offset + wd * offset**2, axis=-1)

    rows, columns = grid
    return factor(wy, rows), factor(wx, columns)


def positional_map(p_y: Array, p_x: Array) -> Array:
    """Returns the positional attention P written out: (H, R, R), (H, C, C) -> (H, N, N)."""
    heads, rows, _ = p_y.shape
    size = rows * p_x.shape[-1]
    # Elementwise, because a matrix unit would round the inputs of an einsum to its own precision.
    outer = p_y[:, :, None, :, None] * p_x[:, None, :, None, :]
    return outer.reshape(heads, size, size)


def contract_positional(p_y: Array, p_x: Array, v: Array) -> Array:
    """Returns P v without writing out P: applies P_y across rows, then P_x across columns.

    Costs O(N (R + C)) multiplications for each channel instead of O(N^2), and needs no (N, N) map.

    Args:
      p_y: (H, R, R), from `positional_factors`.
      p_x: (H, C, C), from `positional_factors`.
      v: (B, N, H, K), the values.

    Returns:
      (B, N, H, K) in v's dtype.
    """
    batch, size, heads, width = v.shape
    rows, columns = p_y.shape[-1], p_x.shape[-1]
    p_y, p_x = p_y.astype(v.dtype), p_x.astype(v.dtype)
    # With the heads in front and the factors broadcast over the batch, neither product transposes
    # v: (R, R) times (R, C K), then for every row (C, C) times (C, K).
    grid = jnp.moveaxis(v, 2, 1).reshape(batch, heads, rows, columns * width)
    grid = jnp.matmul(jnp.broadcast_to(p_y, (batch, *p_y.shape)), grid)
    grid = grid.reshape(batch, heads, rows, columns, width)
    p_x = jnp.broadcast_to(p_x[:, None], (batch, heads, rows, columns, columns))
    grid = jnp.matmul(p_x, grid)
    return jnp.moveaxis(grid.reshape(batch, heads, size, width), 1, 2)


def local_kernel_init(strength: float, use_local_init: bool = True) -> nn.initializers.Initializer:
    """Returns an initialiser of the (3, H) positional kernel that gives each head its own patch.

    The heads form a k x k window with k = floor(sqrt(H)) and centre c. Head h1 + k h2 attends to
    the patch (h2 - c) columns and (h1 - c) rows away from the query. With r_0 this offset and r the
    offset of a key, its score is -strength |r - r_0|^2 up to a constant (paper, section 3;
    `local_init` of the original code). Heads beyond k^2 have random weights, scaled by `strength`
    like the weights of the others.

    Args:
      strength: the paper's alpha. It is an inverse width; in the limit of infinity the layer is a
        convolution.
      use_local_init: False initialises all heads at random, without `strength`.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        kernel = linear_init(key, shape, dtype)
        if not use_local_init:
            return kernel
        k = math.isqrt(shape[-1])
        centre = (k - 1) / 2
        window = [
            (2 * (h2 - centre), 2 * (h1 - centre), -1.0) for h2 in range(k) for h1 in range(k)
        ]
        return strength * kernel.at[:, : k * k].set(jnp.asarray(window, dtype).T)

    return init


class PositionalAttention(nn.Module):
    """The learned part of the positional attention: w and b of w . r_ij + b.

    `positional_factors` turns w into the maps of a grid.

    The bias is the same for every key, so the softmax cancels it: it changes nothing and
    its gradient is zero. It is kept because checkpoints of the original code contain it.

    Attributes:
      num_heads: H.
      locality_strength: the paper's alpha, see `local_kernel_init`.
      use_local_init: see `local_kernel_init`.
    """

    num_heads: int
    locality_strength: float = 1.0
    use_local_init: bool = True

    @nn.compact
    def __call__(self) -> Array:
        """Returns the weights w of dx, dy and dx^2 + dy^2, (3, H) float32."""
        init = local_kernel_init(self.locality_strength, self.use_local_init)
        kernel: Array = self.param("kernel", init, (3, self.num_heads))
        self.param("bias", nn.initializers.zeros, (self.num_heads,), jnp.float32)
        return kernel
