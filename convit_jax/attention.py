"""Gated positional self-attention (GPSA) and plain self-attention.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional
Inductive Biases", ICML 2021, arXiv:2103.10697, section 3.

For head h, query patch i and key patch j (equations 6 and 7 of the paper):

    A_ij = (1 - s(g_h)) softmax_j(q_i . k_j / sqrt(K)) + s(g_h) softmax_j(w_h . r_ij)
    out  = A v

with s the sigmoid, g_h a learned gate and r_ij = (dx, dy, dx^2 + dy^2), where
dx and dy count columns and rows from the query to the key. Three things follow
from these equations; this file is written on them:

1. The second softmax never sees the image: it belongs to the layer.
2. Its score is a function of dx plus a function of dy, so over a grid of patches
   it factorises: P = P_y (x) P_x, one row-stochastic matrix for the rows and one
   for the columns. This holds for every learned w and every rectangular grid, and
   no (N, N, 3) tensor of positions is ever needed.
3. Rows of both softmaxes sum to 1, hence so do the rows of A. The division by the
   row sum in the original code divides by 1 and is left out here.

Shapes: B batch, N patches (or tokens), H heads, K width of a head, D = H K width,
R rows and C columns of the patch grid, N = R C.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convit_jax import sdpa
from convit_jax.sdpa import AttentionFn

Array = jax.Array
Grid = tuple[int, int]

POSITIONAL_FORMS = ("blend", "contract")

# The reference code truncates N(0, 0.02^2) at +-2, which is 100 standard deviations:
# a plain normal. (Initialisers that truncate at 2 sigma give another distribution.)
linear_init = nn.initializers.normal(0.02)
Linear = functools.partial(nn.Dense, kernel_init=linear_init)


def positional_factors(kernel: Array, grid: Grid) -> tuple[Array, Array]:
    """Row and column factors of the positional attention, P = P_y (x) P_x.

    Args:
      kernel: (3, H), the weights of dx, dy and dx^2 + dy^2 for every head.
      grid: (R, C), the patch grid.

    Returns:
      P_y (H, R, R) and P_x (H, C, C), float32, indexed [head, query, key]; every row
      sums to 1. Scores and softmax are float32: dx^2 + dy^2 passes 256 already on a
      14 x 14 grid, beyond which bfloat16 no longer holds every integer.
    """
    wx, wy, wd = kernel.astype(jnp.float32)[:, :, None, None]

    def factor(linear: Array, size: int) -> Array:
        position = jnp.arange(size, dtype=jnp.float32)
        offset = position[None, :] - position[:, None]  # key minus query
        return jax.nn.softmax(linear * offset + wd * offset**2, axis=-1)

    rows, columns = grid
    return factor(wy, rows), factor(wx, columns)


def positional_map(p_y: Array, p_x: Array) -> Array:
    """The positional attention written out: (H, R, R), (H, C, C) -> (H, N, N)."""
    heads, rows, _ = p_y.shape
    size = rows * p_x.shape[-1]
    # Elementwise and not an einsum: an outer product sent to a matrix unit would be
    # rounded to its input precision.
    outer = p_y[:, :, None, :, None] * p_x[:, None, :, None, :]
    return outer.reshape(heads, size, size)


def contract_positional(p_y: Array, p_x: Array, v: Array) -> Array:
    """P v without P: along the columns with P_x, then along the rows with P_y.

    O(N (R + C)) multiplications a channel instead of O(N^2), and no (N, N) map.

    Args:
      p_y: (H, R, R) and
      p_x: (H, C, C), from `positional_factors`.
      v: (B, N, H, K).

    Returns:
      (B, N, H, K) in v's dtype.
    """
    batch, size, heads, width = v.shape
    rows, columns = p_y.shape[-1], p_x.shape[-1]
    p_y, p_x = p_y.astype(v.dtype), p_x.astype(v.dtype)
    # Heads in front and the factors spread over the batch, so that both products read and write v
    # as it lies: (R, R) times (R, C K), then for every row (C, C) times (C, K).
    grid = jnp.moveaxis(v, 2, 1).reshape(batch, heads, rows, columns * width)
    grid = jnp.matmul(jnp.broadcast_to(p_y, (batch, *p_y.shape)), grid)
    grid = grid.reshape(batch, heads, rows, columns, width)
    p_x = jnp.broadcast_to(p_x[:, None], (batch, heads, rows, columns, columns))
    grid = jnp.matmul(p_x, grid)
    return jnp.moveaxis(grid.reshape(batch, heads, size, width), 1, 2)


def blended_map(content: Array, positional: Array, share: Array) -> Array:
    """The map A of equation 7.

    Args:
      content: (B, H, N, N).
      positional: (H, N, N).
      share: (H,), of the positional part: the sigmoid of the gates.

    Returns:
      (B, H, N, N), float32; every row sums to 1.
    """
    share = share[:, None, None]
    return (1.0 - share) * content + share * positional


def choose_forms(
    attention: str | AttentionFn,
    positional: str,
    tokens: int,
    attn_dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[str | AttentionFn, str]:
    """What "auto" stands for in `GPSA.attention` and `GPSA.positional`.

    The two go together: a map that is blended has to be written out. Where either will do, the
    positional part is contracted on a CPU and blended elsewhere: the axes of a 14 x 14 grid leave
    matrix units of 128 x 128 idle (benchmarks/README.md has what was measured).

    Args:
      tokens: N.
      backend: "cpu", "gpu" or "tpu"; None is JAX's default.
    """
    attention = sdpa.choose(attention, tokens, attn_dropout) if positional != "blend" else "xla"
    if positional == "auto":
        is_cpu = (backend or jax.default_backend()) == "cpu"
        contract = attention != "xla" or (is_cpu and not attn_dropout)
        positional = "contract" if contract else "blend"
    return attention, positional


def check_forms(attention: str | AttentionFn, positional: str, attn_dropout: float) -> None:
    """Raises ValueError unless the options of `GPSA` by these names fit together."""
    sdpa.check(attention)
    if positional not in ("auto", *POSITIONAL_FORMS):
        raise ValueError(
            f"positional: expected auto or one of {POSITIONAL_FORMS}, got {positional!r}"
        )
    blend = positional == "blend" or attn_dropout > 0
    if blend and attention not in ("auto", "xla"):
        why = "positional='blend'" if positional == "blend" else f"attn_dropout={attn_dropout}"
        raise ValueError(f"attention: expected auto or xla with {why}, got {attention!r}")
    if attn_dropout and positional == "contract":
        raise ValueError(
            "attn_dropout acts on the blended map: expected positional auto or blend, got "
            f"'contract' with attn_dropout={attn_dropout}"
        )


def local_kernel_init(strength: float, use_local_init: bool = True) -> nn.initializers.Initializer:
    """Initialiser of the (3, H) positional kernel: one head for each cell of a k x k window.

    With k = floor(sqrt(H)), head h1 + k h2 attends to the patch (h2 - c) columns and (h1 - c)
    rows away, c being the centre of the window: -strength |r - r_0|^2 up to a constant
    (paper, section 3; `local_init` of the original code). Heads beyond k^2 keep their random
    weights, scaled by `strength` like all the others.

    Args:
      strength: the paper's alpha, an inverse width; infinity is a convolution.
      use_local_init: False leaves all heads to the generic random initialisation.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        kernel = linear_init(key, shape, dtype)
        if not use_local_init:
            return kernel
        k = math.isqrt(shape[-1])
        centre = (k - 1) / 2 if k % 2 == 0 else k // 2
        window = [
            (2 * (h2 - centre), 2 * (h1 - centre), -1.0) for h2 in range(k) for h1 in range(k)
        ]
        return strength * kernel.at[:, : k * k].set(jnp.asarray(window, dtype).T)

    return init


def identity_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Initialiser of the value projection: the identity (`local_init` of the original code)."""
    del key
    return jnp.eye(*shape, dtype=dtype)


class PositionalAttention(nn.Module):
    """The learned part of the positional attention: w and b of w . r_ij + b.

    The bias is the same for every key, so the softmax cancels it: it changes nothing and
    its gradient is zero. It is kept because checkpoints of the original hold it.
    """

    num_heads: int
    locality_strength: float = 1.0
    use_local_init: bool = True

    @nn.compact
    def __call__(self, grid: Grid) -> tuple[Array, Array]:
        """Returns the factors P_y (H, R, R) and P_x (H, C, C) for a grid (R, C)."""
        init = local_kernel_init(self.locality_strength, self.use_local_init)
        kernel = self.param("kernel", init, (3, self.num_heads))
        self.param("bias", nn.initializers.zeros, (self.num_heads,))
        return positional_factors(kernel, grid)


def _check_heads(num_heads: int, width: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads must divide the width: expected a divisor of {width}, got {num_heads}"
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention, as in ViT and DeiT.

    Attributes:
      num_heads: H; must divide the width D of the input.
      qkv_bias: whether the query, key and value projection has a bias.
      qk_scale: factor of the scores; None is K ** -0.5.
      attn_dropout: rate of dropout on the attention map; needs attention="xla".
      dropout: rate of dropout on the output.
      attention: how softmax(q k^T) v is computed: "auto", a name of `sdpa.IMPLEMENTATIONS`, or a
        function with the signature of `jax.nn.dot_product_attention`.
      queries: attention from the first so many tokens only, to all; None is from every token. It
        is always "xla": a map of few queries is small.
      dtype: of the matrix products. Softmaxes are always float32.
    """

    num_heads: int
    qkv_bias: bool = False
    qk_scale: float | None = None
    attn_dropout: float = 0.0
    dropout: float = 0.0
    attention: str | AttentionFn = "auto"
    queries: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        sdpa.check(self.attention)
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"queries: expected None or 1 or more, got {self.queries}")
        if self.attn_dropout and self.attention not in ("auto", "xla"):
            raise ValueError(
                "attn_dropout acts on the map of attention='xla': expected that or 'auto' with "
                f"attn_dropout={self.attn_dropout}, got {self.attention!r}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        grid: Grid | None = None,
        train: bool = False,
        return_attention: bool = False,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Attends from tokens to every token.

        Args:
          x: (B, N, D).
          grid: not used; here so that both attentions are called alike.
          train: whether dropout is on; needs the rng stream "dropout" if a rate is not 0.
          return_attention: whether to return the attention map as well.

        Returns:
          (B, N, D) in `dtype`; with `return_attention`, also {"content": (B, H, N, N) float32}.
          With `queries`, (B, queries, D) and (B, H, queries, N).
        """
        batch, size, width = x.shape
        _check_heads(self.num_heads, width)
        head = width // self.num_heads
        scale = self.qk_scale or head**-0.5
        qkv = Linear(3 * width, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, size, 3, self.num_heads, head)
        q, k, v = qkv[:, : self.queries, 0], qkv[:, :, 1], qkv[:, :, 2]

        if train and self.attn_dropout:
            drop = nn.Dropout(self.attn_dropout, deterministic=False, name="attn_drop")
            out = sdpa.keep(sdpa.apply_map(drop(sdpa.content_map(q, k, scale)), v))
        else:
            attention = sdpa.choose(self.attention, size, self.attn_dropout)
            attention = "xla" if self.queries else attention
            out = sdpa.attention_fn(attention)(q, k, v, scale=scale)
        out = _project(out, self.dropout, train, self.dtype)
        return (out, {"content": sdpa.content_map(q, k, scale)}) if return_attention else out


class GPSA(nn.Module):
    """Gated positional self-attention over a grid of patches.

    Attributes:
      num_heads: H; must divide the width D of the input.
      qkv_bias: whether the query, key and value projections have biases.
      qk_scale: factor of the content scores; None is K ** -0.5.
      attn_dropout: rate of dropout on the blended attention map; needs positional="blend" or
        "auto".
      dropout: rate of dropout on the output.
      locality_strength: the paper's alpha; how sharply heads look at their patch at the start.
      use_local_init: False starts from random positions and values (the paper's ablation).
      positional: "blend" mixes P = P_y (x) P_x into the content map and applies the blended map
        to v; "contract" applies P_y and P_x along rows and columns of v, beside the content part.
        The same function, other costs: "auto" is `choose_forms`.
      attention: how the content part is computed: "auto", a name of `sdpa.IMPLEMENTATIONS`, or a
        function with the signature of `jax.nn.dot_product_attention`. All but "xla" need
        positional="contract".
      dtype: of the matrix products. Positions, softmaxes and gates are always float32.
    """

    num_heads: int
    qkv_bias: bool = False
    qk_scale: float | None = None
    attn_dropout: float = 0.0
    dropout: float = 0.0
    locality_strength: float = 1.0
    use_local_init: bool = True
    positional: str = "auto"
    attention: str | AttentionFn = "auto"
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_forms(self.attention, self.positional, self.attn_dropout)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, grid: Grid, train: bool = False, return_attention: bool = False
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Attends from every patch to every patch.

        Args:
          x: (B, N, D), the patches in row-major order.
          grid: (R, C), the static patch grid; R C must be N.
          train: whether dropout is on; needs the rng stream "dropout" if a rate is not 0.
          return_attention: whether to return the maps as well; nothing is computed for them
            otherwise.

        Returns:
          (B, N, D) in `dtype`; with `return_attention`, also the maps, float32: "content"
          (B, H, N, N), "positional" (H, N, N), "gate" (H,) after the sigmoid, "blended"
          (B, H, N, N).

        Raises:
          ValueError: if the heads do not divide D, or the grid does not have N patches.
        """
        batch, size, width = x.shape
        _check_heads(self.num_heads, width)
        if grid[0] * grid[1] != size:
            raise ValueError(f"grid {grid} has {grid[0] * grid[1]} patches: expected {size}")
        head = width // self.num_heads
        scale = self.qk_scale or head**-0.5

        linear = functools.partial(Linear, use_bias=self.qkv_bias, dtype=self.dtype)
        qk = linear(2 * width, name="qk")(x).reshape(batch, size, 2, self.num_heads, head)
        q, k = qk[:, :, 0], qk[:, :, 1]
        v_init = identity_init if self.use_local_init else linear_init
        v = linear(width, kernel_init=v_init, name="v")(x)
        v = v.reshape(batch, size, self.num_heads, head)

        gate = self.param("gate", nn.initializers.ones, (self.num_heads,))
        share = jax.nn.sigmoid(gate.astype(jnp.float32))
        p_y, p_x = PositionalAttention(
            self.num_heads, self.locality_strength, self.use_local_init, name="pos_proj"
        )(grid)

        attention, positional = choose_forms(
            self.attention, self.positional, size, self.attn_dropout
        )
        if positional == "blend":
            content = sdpa.content_map(q, k, scale)
            blended = blended_map(content, positional_map(p_y, p_x), share)
            drop = nn.Dropout(self.attn_dropout, deterministic=not train, name="attn_drop")
            out = sdpa.keep(sdpa.apply_map(drop(blended), v))
        else:
            content_out = sdpa.attention_fn(attention)(q, k, v, scale=scale)
            # Both parts are kept, for the gates' gradient, and their sum is computed again.
            positional_out = sdpa.keep(contract_positional(p_y, p_x, v))
            out = (1.0 - share[:, None]) * content_out + share[:, None] * positional_out
        out = _project(out, self.dropout, train, self.dtype)
        if not return_attention:
            return out
        content, positional = sdpa.content_map(q, k, scale), positional_map(p_y, p_x)
        return out, {
            "content": content,
            "positional": positional,
            "gate": share,
            "blended": blended_map(content, positional, share),
        }


def _project(out: Array, dropout: float, train: bool, dtype: Any) -> Array:
    """The output projection: (B, N, H, K) -> (B, N, D). Called inside a compact module."""
    batch, size, heads, head = out.shape
    out = out.reshape(batch, size, heads * head).astype(dtype)
    out = Linear(heads * head, dtype=dtype, name="proj")(out)
    return nn.Dropout(dropout, deterministic=not train, name="proj_drop")(out)
