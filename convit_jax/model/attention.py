"""Gated positional self-attention (GPSA) and plain self-attention.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional
Inductive Biases", ICML 2021, arXiv:2103.10697, section 3.

For head h, query patch i and key patch j (equations 6 and 7 of the paper):

    A_ij = (1 - s(g_h)) softmax_j(q_i . k_j / sqrt(K)) + s(g_h) softmax_j(w_h . r_ij)
    out  = A v

with s the sigmoid, g_h a learned gate and r_ij = (dx, dy, dx^2 + dy^2), where
dx and dy count columns and rows from the query to the key. The code relies on
three consequences of these equations:

1. The second softmax does not depend on the image. A layer computes it once for
   the whole batch.
2. The score of the second softmax is a function of dx plus a function of dy. Over
   a grid of patches that softmax is therefore a Kronecker product P = P_y (x) P_x:
   one row-stochastic matrix for the rows and one for the columns. This holds for
   every learned w and every rectangular grid. No (N, N, 3) tensor of positions is
   needed.
3. The rows of both softmaxes sum to 1, so the rows of A do too. The original code
   divides A by its row sums. That is a division by 1, and it is left out here.

Shapes: B batch, N patches (or tokens), H heads, K width of a head, D = H K width,
R rows and C columns of the patch grid, N = R C.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convit_jax.model import fused, remat, sdpa
from convit_jax.model.fused import Fused
from convit_jax.model.linear import linear_init, linear_over_tokens
from convit_jax.model.positional import (
    PositionalAttention,
    contract_positional,
    positional_factors,
    positional_map,
)
from convit_jax.model.sdpa import Attention, AttentionFn

Array = jax.Array
Grid = tuple[int, int]

POSITIONAL_FORMS = ("blend", "contract")

# On a CPU, forward and backward of one layer: blending takes 0.73 to 0.90 of the time of the
# contraction on 4 x 4 and 6 x 6 patches, the same on 8 x 8, 1.1 to 3 times as much from 10 x 10
# to 14 x 14 (heads of 16 and 48 channels).
CONTRACT_FROM = 64


def blended_map(content: Array, positional: Array, share: Array) -> Array:
    """Returns the attention map A of equation 7: content and positional maps mixed by the gates.

    `GPSA.__call__` also has equation 7 with both parts multiplied by the values first, which needs
    no map.

    Args:
      content: (B, H, N, N), softmax of the content scores.
      positional: (H, N, N), softmax of the positional scores.
      share: (H,), weight of the positional map in each head: the sigmoid of its gate.

    Returns:
      (B, H, N, N), float32; every row sums to 1.
    """
    share = share[None, :, None, None]
    return (1.0 - share) * content + share * positional[None]


def shifted_map(attention: Array, offset: Array | None) -> Array:
    """Returns an attention map plus an offset of its shape, (B, H, N, N); None adds nothing.

    Raises:
      ValueError: if the shapes differ.
    """
    if offset is None:
        return attention
    if offset.shape != attention.shape:
        raise ValueError(
            f"attention offset: expected the map's shape {attention.shape}, got {offset.shape}"
        )
    return attention + offset.astype(attention.dtype)


def choose_forms(
    attention: Attention,
    positional: str,
    tokens: int,
    attn_dropout: float = 0.0,
    *,
    dtype: Any = jnp.float32,
    width: int = 64,
    heads: int = 1,
    backend: str | None = None,
    batch: int = 1,
    split: bool = False,
) -> tuple[Attention, str]:
    """Replaces "auto" in `GPSA.attention` and `GPSA.positional` by the implementation to use.

    The two options depend on each other: blending needs the content map, so positional="blend"
    implies attention="xla", or "fused" on a TPU. Where both forms are possible, the positional part
    is contracted on a CPU from `CONTRACT_FROM` patches on, and blended otherwise. The contraction
    multiplies by matrices of the size of the grid's axes; those of a 14 x 14 grid leave most of a
    128 x 128 matrix unit idle. benchmarks/README.md has the measurements.

    "fused" is the choice on a TPU where its maps fit into the chip's memory, see `fused.fits`. The
    compiler does not split the kernel over devices. So it is the choice only for one device, or
    with `split`.

    Args:
      attention: `GPSA.attention`.
      positional: `GPSA.positional`.
      tokens: N.
      attn_dropout: `GPSA.attn_dropout`.
      dtype: `GPSA.dtype`.
      width: K.
      heads: H.
      backend: "cpu", "gpu" or "tpu"; None means JAX's default backend.
      batch: B, which may be symbolic (jax.export).
      split: whether the caller splits the kernel over its devices, see `Fused.split`.

    Returns:
      (attention, positional), neither of them "auto".
    """
    if fused.is_fused(attention):
        return attention, "blend"
    if attention == "auto" and positional != "contract" and not attn_dropout:
        on_tpu = (backend or jax.default_backend()) == "tpu" and (split or jax.device_count() == 1)
        # The kernel needs sizes that are numbers.
        known = isinstance(tokens, int) and isinstance(batch, int)
        if on_tpu and known and fused.fits(heads, width, tokens, dtype):
            return "fused", "blend"
    if positional == "blend":
        return "xla", positional
    attention = sdpa.choose(
        attention, tokens, attn_dropout, dtype=dtype, width=width, backend=backend
    )
    if positional == "auto":
        is_cpu = (backend or jax.default_backend()) == "cpu"
        # A program for any image size (jax.export) has a symbolic N, which compares with no number.
        large = not isinstance(tokens, int) or tokens >= CONTRACT_FROM
        contract = attention != "xla" or (is_cpu and large and not attn_dropout)
        positional = "contract" if contract else "blend"
    return attention, positional


def check_forms(attention: Attention, positional: str, attn_dropout: float) -> None:
    """Raises ValueError unless these options of `GPSA` are known and fit together."""
    sdpa.check(attention)
    if positional not in ("auto", *POSITIONAL_FORMS):
        raise ValueError(
            f"positional: expected auto or one of {POSITIONAL_FORMS}, got {positional!r}"
        )
    is_fused = fused.is_fused(attention)
    if attn_dropout and attention not in ("auto", "xla"):
        raise ValueError(
            f"attention: expected auto or xla with attn_dropout={attn_dropout}, got {attention!r}"
        )
    if positional == "blend" and attention not in ("auto", "xla") and not is_fused:
        raise ValueError(
            f"attention: expected auto, xla or fused with positional='blend', got {attention!r}"
        )
    if positional == "contract" and is_fused:
        raise ValueError(
            "positional: expected auto or blend with attention='fused', which blends the maps "
            "inside the kernel, got 'contract'"
        )
    if attn_dropout and positional == "contract":
        raise ValueError(
            "attn_dropout acts on the blended map: expected positional auto or blend, got "
            f"'contract' with attn_dropout={attn_dropout}"
        )


def _choose(
    module: "SelfAttention | GPSA", x: Array, positional: str
) -> tuple[Fused | None, str | AttentionFn, str]:
    """Returns `choose_forms` of a module and its input, (B, N, D).

    Returns:
      The fused kernel or None; the attention to use without the kernel; and `positional`.
    """
    batch, size, width = x.shape
    attention, positional = choose_forms(
        module.attention, positional, size, module.attn_dropout, dtype=module.dtype,
        width=width // module.num_heads, heads=module.num_heads, batch=batch,
    )  # fmt: skip
    if attention != "fused" and not isinstance(attention, Fused):
        return None, attention, positional
    # No parameter depends on the kernel, which would have to be split over the devices.
    return None if module.is_initializing() else fused.of(attention), "xla", positional


def identity_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Initialises the value projection as the identity (`local_init` of the original code)."""
    del key
    rows, columns = shape
    return jnp.eye(rows, columns, dtype=dtype)


def _check_heads(num_heads: int, width: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads must divide the width: expected a divisor of {width}, got {num_heads}"
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention, as in ViT and DeiT.

    Attributes:
      num_heads: H; must divide D, the width of the input.
      qkv_bias: whether the query, key and value projection has a bias.
      qk_scale: factor of the scores q k^T; None means K ** -0.5.
      attn_dropout: dropout rate of the attention map; needs attention="xla" or "auto".
      dropout: dropout rate of the output.
      attention: how softmax(q k^T) v is computed: "auto", a name of `sdpa.IMPLEMENTATIONS`, a
        function with the signature of `jax.nn.dot_product_attention`, or a `fused.Fused`.
      queries: number of tokens that attend, counted from the first; None means all. Keys and
        values always come from all tokens. With `queries` the implementation is "fused" or "xla",
        because the map of a few queries is small.
      flat_tokens: whether linear layers see images and tokens as one axis, see `ConViT`.
      dtype: dtype of the matrix products. Softmaxes are always float32.

    Raises:
      ValueError: on construction, if the options do not fit together.
    """

    num_heads: int
    qkv_bias: bool = False
    qk_scale: float | None = None
    attn_dropout: float = 0.0
    dropout: float = 0.0
    attention: Attention = "auto"
    queries: int | None = None
    flat_tokens: bool | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
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
        offset: Array | None = None,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Attends from all tokens, or from the first `queries`, to all tokens.

        Args:
          x: (B, N, D).
          grid: ignored; it is here so that `SelfAttention` and `GPSA` are called alike.
          train: whether dropout is on. A rate above 0 then needs the rng stream "dropout".
          return_attention: whether to return the attention map too.
          offset: (B, H, N, N), added to the attention map before dropout. The gradient with respect
            to an offset of zeros is the gradient with respect to the map. The map is then written
            out, whatever `attention` says. The map that is returned is without the offset.

        Returns:
          (B, N, D) in `dtype`; with `return_attention`, also {"content": (B, H, N, N) float32}.
          With `queries` the shapes are (B, queries, D) and (B, H, queries, N).

        Raises:
          ValueError: if num_heads does not divide D, or `offset` has another shape than the map.
        """
        batch, size, width = x.shape
        _check_heads(self.num_heads, width)
        head = width // self.num_heads
        scale = self.qk_scale or head**-0.5
        linear = functools.partial(linear_over_tokens(self.flat_tokens), dtype=self.dtype)
        qkv = remat.keep(linear(3 * width, use_bias=self.qkv_bias, name="qkv")(x))
        parts = qkv.reshape(batch, size, 3, self.num_heads, head)
        q, k, v = parts[:, : self.queries, 0], parts[:, :, 1], parts[:, :, 2]
        kernel, attention, _ = _choose(self, x, "auto")
        needs_map = offset is not None or (train and self.attn_dropout > 0)
        by_kernel = kernel is not None and not needs_map

        if needs_map:
            content = shifted_map(sdpa.content_map(q, k, scale), offset)
            drop = nn.Dropout(self.attn_dropout, deterministic=not train, name="attn_drop")
            out = sdpa.keep(sdpa.apply_map(drop(content), v))
        elif kernel:
            out = kernel.self_attention(
                qkv, heads=self.num_heads, scale=scale, queries=self.queries
            ).reshape(q.shape)
        else:
            attention = "xla" if self.queries else attention
            out = sdpa.attention_fn(attention)(q, k, v, scale=scale)
        out = _project(out, linear, self.dropout, train, by_kernel)
        return (out, {"content": sdpa.content_map(q, k, scale)}) if return_attention else out


class GPSA(nn.Module):
    """Gated positional self-attention over a grid of patches.

    Source: d'Ascoli et al. 2021, section 3, equations 6 and 7.

    Attributes:
      num_heads: H; must divide D, the width of the input.
      qkv_bias: whether the query, key and value projections have biases.
      qk_scale: factor of the content scores q k^T; None means K ** -0.5.
      attn_dropout: dropout rate of the blended attention map; needs positional="blend" or "auto".
      dropout: dropout rate of the output.
      locality_strength: the paper's alpha. A larger alpha focuses each head more sharply on its
        patch at initialisation.
      use_local_init: whether positional and value projections get the convolutional
        initialisation; False initialises both at random (the paper's ablation).
      gate_init: initial value of the gates g_h, before the sigmoid.
      positional: how the positional part is computed. "blend" writes out P = P_y (x) P_x, mixes it
        into the content map and applies the blended map to v. "contract" applies P_y across the
        rows and P_x across the columns of v and adds the result to the content part. Both compute
        the same function at different cost. "auto" takes the choice of `choose_forms`.
      attention: how the content part is computed: "auto", a name of `sdpa.IMPLEMENTATIONS`, a
        function with the signature of `jax.nn.dot_product_attention`, or a `fused.Fused`. "fused"
        computes the positional part too, and blends; it needs positional="blend" or "auto". Every
        other value but "auto" and "xla" needs positional="contract" or "auto".
      flat_tokens: whether linear layers see images and tokens as one axis, see `ConViT`.
      dtype: dtype of the matrix products. Positions, softmaxes and gates are always float32.

    Raises:
      ValueError: on construction, if the options do not fit together.
    """

    num_heads: int
    qkv_bias: bool = False
    qk_scale: float | None = None
    attn_dropout: float = 0.0
    dropout: float = 0.0
    locality_strength: float = 1.0
    use_local_init: bool = True
    gate_init: float = 1.0
    positional: str = "auto"
    attention: Attention = "auto"
    flat_tokens: bool | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_forms(self.attention, self.positional, self.attn_dropout)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        grid: Grid,
        train: bool = False,
        return_attention: bool = False,
        offset: Array | None = None,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Attends from every patch to every patch.

        Args:
          x: (B, N, D), the patches in row-major order.
          grid: (R, C), the static patch grid; R C must be N.
          train: whether dropout is on. A rate above 0 then needs the rng stream "dropout".
          return_attention: whether to compute and return the attention maps too.
          offset: (B, H, N, N), added to the blended map before dropout. The gradient with respect
            to an offset of zeros is the gradient with respect to the map. The map is then written
            out, whatever `attention` and `positional` say. The maps that are returned are without
            the offset.

        Returns:
          (B, N, D) in `dtype`. With `return_attention`, also a dictionary of float32 arrays:
          "content" (B, H, N, N), "positional" (H, N, N), "gate" (H,) after the sigmoid, and
          "blended" (B, H, N, N).

        Raises:
          ValueError: if num_heads does not divide D, the grid does not have N patches, or `offset`
            has another shape than the map.
        """
        batch, size, width = x.shape
        _check_heads(self.num_heads, width)
        if grid[0] * grid[1] != size:
            raise ValueError(f"grid {grid} has {grid[0] * grid[1]} patches: expected {size}")
        head = width // self.num_heads
        scale = self.qk_scale or head**-0.5

        linear = functools.partial(linear_over_tokens(self.flat_tokens), dtype=self.dtype)
        qk = remat.keep(linear(2 * width, use_bias=self.qkv_bias, name="qk")(x))
        parts = qk.reshape(batch, size, 2, self.num_heads, head)
        q, k = parts[:, :, 0], parts[:, :, 1]
        init = identity_init if self.use_local_init else linear_init
        v_linear = linear(width, use_bias=self.qkv_bias, kernel_init=init, name="v")
        flat_v = remat.keep(v_linear(x))
        v = flat_v.reshape(batch, size, self.num_heads, head)

        gate = self.param(
            "gate", nn.initializers.constant(self.gate_init), (self.num_heads,), jnp.float32
        )
        share = jax.nn.sigmoid(gate.astype(jnp.float32))
        weights = PositionalAttention(
            self.num_heads, self.locality_strength, self.use_local_init, name="pos_proj"
        )()
        p_y, p_x = positional_factors(weights, grid)

        kernel, attention, positional = _choose(self, x, self.positional)
        by_kernel = kernel is not None and offset is None
        if kernel is not None and by_kernel:
            out = kernel.gpsa(qk, flat_v, weights, gate, grid=grid, scale=scale).reshape(v.shape)
        elif positional == "blend" or offset is not None:
            content = sdpa.content_map(q, k, scale)
            blended = shifted_map(blended_map(content, positional_map(p_y, p_x), share), offset)
            drop = nn.Dropout(self.attn_dropout, deterministic=not train, name="attn_drop")
            out = sdpa.keep(sdpa.apply_map(drop(blended), v))
        else:
            content_out = sdpa.attention_fn(attention)(q, k, v, scale=scale)
            # The gradient of the gates reads both parts, so rematerialisation keeps them. Their
            # sum is cheap and is computed again.
            positional_out = sdpa.keep(contract_positional(p_y, p_x, v))
            of_head = share[None, None, :, None]
            content_out, positional_out = (
                part.astype(jnp.float32) for part in (content_out, positional_out)
            )
            out = (1.0 - of_head) * content_out + of_head * positional_out
        out = _project(out, linear, self.dropout, train, by_kernel)
        if not return_attention:
            return out
        content, position = sdpa.content_map(q, k, scale), positional_map(p_y, p_x)
        return out, {
            "content": content,
            "positional": position,
            "gate": share,
            "blended": blended_map(content, position, share),
        }


def _project(
    out: Array, linear: Callable[..., nn.Dense], dropout: float, train: bool, by_kernel: bool
) -> Array:
    """Applies the output projection: (B, N, H, K) -> (B, N, D). Only for compact methods.

    Args:
      out: the result of the attention.
      linear: constructor of a linear layer.
      dropout: dropout rate.
      train: whether dropout is on.
      by_kernel: whether the fused kernel computed `out`. The projection then tags it to be kept;
        other forms of attention have done so.
    """
    batch, size, heads, head = out.shape
    options = {"dot_general": remat.product_of_kept} if by_kernel else {}
    layer = linear(heads * head, name="proj", **options)
    out = remat.keep(layer(out.reshape(batch, size, heads * head)))
    return nn.Dropout(dropout, deterministic=not train, name="proj_drop")(out)
