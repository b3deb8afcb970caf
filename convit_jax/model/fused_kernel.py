"""GPSA and plain self-attention as one fused TPU kernel, written in Pallas.

The kernel computes, for every image and head (equations 6 and 7 of the paper, see attention.py),

    out = A v,    A = c softmax(q k^T scale) + T,    c = 1 - s(g),    T = s(g) P

with T = 0 and c = 1 for plain self-attention. No attention map leaves the chip's vector memory
(VMEM). One image is one turn of the kernel's grid. T does not depend on the image, so it stays in
VMEM while the images pass. The backward kernel computes the maps again from q, k and v. It sums the
gradients of T and c over the images in VMEM too.

The kernel reads q, k and v where the projections leave them, side by side in the last axis, and
writes their gradients in the same layout. So nothing is transposed or sliced around it. fused.py
makes T and c, and chooses G.

Softmaxes, gates and sums are float32. No TPU has run the kernel so far: tests interpret it on a
CPU, and the TPU's compiler accepts it.

Shapes: B batch, N tokens, M queries, H heads, K width of a head, D = H K, G heads of a group,
R rows and C columns of the patch grid.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

Array = jax.Array

# Without a limit of its own a kernel gets less VMEM than some chips have. The compiler refuses what
# a chip does not have, whatever this says; `fused.group_of` keeps the kernel within it.
_VMEM_LIMIT = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One case of the kernel: all that is known before the arrays are.

    Attributes:
      heads: H.
      width: K.
      tokens: N.
      queries: M, number of tokens that attend, counted from the first.
      scale: factor of the scores.
      positional: whether there are a positional map T and a share c of the content map. Then q and
        k are in one array and v in another; else all three are in one.
      group: G.
      interpret: whether the kernel is interpreted, which needs no TPU and is slow; or how, by
        `pltpu.InterpretParams`.
    """

    heads: int
    width: int
    tokens: int
    queries: int
    scale: float
    positional: bool
    group: int
    interpret: Any = False

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where q, k and v are: (number of the array, number of D channels before it)."""
        return ((0, 0), (0, 1), (1, 0)) if self.positional else ((0, 0), (0, 1), (0, 2))

    @property
    def whole(self) -> bool:
        """Whether all heads are computed in one turn. Then a block has all channels."""
        return self.group == self.heads

    @property
    def counts(self) -> tuple[int, ...]:
        """How many of q, k and v each array of the kernel has."""
        if not self.whole:
            return 1, 1, 1
        return (2, 1) if self.positional else (3,)

    def operands(self, arrays: tuple[Array, ...]) -> list[Array]:
        """Returns the arrays that are passed to the kernel: one for each of `inputs`."""
        return list(arrays) if self.whole else [arrays[number] for number, _ in self.places]

    def inputs(self) -> list[pl.BlockSpec]:
        """Returns the blocks of q, k and v, for a grid of (groups of heads, images)."""
        if self.whole:
            return self.gradients()
        size, groups = self.group * self.width, self.heads // self.group
        return [
            pl.BlockSpec((1, self.tokens, size), lambda g, b, first=first: (b, 0, first + g))
            for first in (before * groups for _, before in self.places)
        ]

    def gradients(self) -> list[pl.BlockSpec]:
        """Returns the blocks of the gradients of q, k and v."""
        return [self.block(self.tokens, count) for count in self.counts]

    def block(self, rows: int, count: int = 1) -> pl.BlockSpec:
        """Returns the block of an array (B, rows, count D)."""
        return pl.BlockSpec((1, rows, count * self.group * self.width), lambda g, b: (b, 0, g))

    def maps(self) -> list[pl.BlockSpec]:
        """Returns the blocks of T and c. They stay in VMEM while the images pass."""
        if not self.positional:
            return []
        return [self.map(), pl.BlockSpec(memory_space=pltpu.SMEM)]

    def map(self) -> pl.BlockSpec:
        """Returns the block of T or its gradient. Only one is in VMEM, that of the group."""
        shape = (self.group, self.tokens, self.tokens)
        return pl.BlockSpec(shape, lambda g, b: (g, 0, 0), pipeline_mode=pl.Buffered(1))

    def lanes(self, part: int, head: int) -> tuple[int, slice]:
        """Returns where a head's q, k or v is: (number of the block, its channels)."""
        number, before = self.places[part] if self.whole else (part, 0)
        first = (before * self.heads + head) * self.width
        return number, slice(first, first + self.width)

    def of_head(self, head: int) -> slice:
        """Returns the channels of a head in a group."""
        return slice(head * self.width, (head + 1) * self.width)

    def gather(self, blocks: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Copies q, k and v from their blocks to arrays (G, N, K), where a loop can index heads."""
        for part, of_part in enumerate(scratch):
            for head in range(self.group):
                number, lanes = self.lanes(part, head)
                of_part[head] = blocks[number][0, : of_part.shape[1], lanes]

    def scatter(self, scratch: Sequence[Any], blocks: Sequence[Any]) -> None:
        """Copies arrays (G, N, K) to the blocks of q, k and v. Missing queries become zeros."""
        for part, of_part in enumerate(scratch):
            for head in range(self.group):
                number, lanes = self.lanes(part, head)
                rows = of_part.shape[1]
                if rows < self.tokens:
                    zeros = jnp.zeros((self.tokens, self.width), of_part.dtype)
                    blocks[number][0, :, lanes] = zeros
                blocks[number][0, :rows, lanes] = of_part[head]

    def scratch(self, dtype: Any) -> list[Any]:
        """Returns arrays for q, k, v and the output's gradient of each head."""
        rows = (self.queries, self.tokens, self.tokens, self.queries)
        return [pltpu.VMEM((self.group, n, self.width), dtype) for n in rows]

    def joined(self, gradients: list[Array]) -> tuple[Array, ...]:
        """Returns the gradients of the arrays, from those of q, k and v."""
        if self.whole:
            return tuple(gradients)
        d_q, d_k, d_v = gradients
        if self.positional:
            return jnp.concatenate([d_q, d_k], axis=-1), d_v
        return (jnp.concatenate([d_q, d_k, d_v], axis=-1),)

    def options(
        self, name: str, batch: int, products: int, moved: list[Any], in_turn: bool
    ) -> dict[str, Any]:
        """Returns options of the call, with what it costs, for the compiler.

        Args:
          name: name of the call.
          batch: B.
          products: number of products of the size of a map.
          moved: arrays that are read or written.
          in_turn: whether images must be computed one after another, because of a sum over them.
            Else a chip with two cores (v4, v5p) may divide them.
        """
        size = batch * self.heads * self.queries * self.tokens
        return {
            "name": name,
            "grid": (self.heads // self.group, batch),
            "interpret": self.interpret,
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary" if in_turn else "parallel"),
                vmem_limit_bytes=_VMEM_LIMIT,
            ),
            "cost_estimate": pl.CostEstimate(
                flops=2 * products * size * self.width,
                transcendentals=size,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
            ),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(kernel: Kernel, arrays: tuple[Array, ...], maps: tuple[Array, ...]) -> Array:
    """Returns A v, (B, M, D).

    Args:
      kernel: the case.
      arrays: (qk, v) or (qkv,).
      maps: T (H, N, N) and c (H,), float32; or nothing.
    """
    return _forward(kernel, arrays, maps)[0]


_Residuals = tuple[tuple[Array, ...], tuple[Array, ...]]


def _forward(
    kernel: Kernel, arrays: tuple[Array, ...], maps: tuple[Array, ...]
) -> tuple[Array, _Residuals]:
    batch, channels = arrays[0].shape[0], kernel.heads * kernel.width
    out = jax.ShapeDtypeStruct((batch, kernel.queries, channels), arrays[0].dtype)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, kernel),
        in_specs=[*kernel.inputs(), *kernel.maps()],
        out_specs=kernel.block(kernel.queries),
        out_shape=out,
        scratch_shapes=kernel.scratch(arrays[0].dtype)[:3],
        **kernel.options("fused_attention", batch, 2, [*arrays, *maps, out], in_turn=False),
    )
    return call(*kernel.operands(arrays), *maps), (arrays, maps)


def _backward(
    kernel: Kernel, residuals: _Residuals, d_out: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    arrays, maps = residuals
    batch, dtype = d_out.shape[0], d_out.dtype
    specs, counts = kernel.gradients(), kernel.counts
    channels = kernel.heads * kernel.width
    shapes = [(batch, kernel.tokens, count * channels) for count in counts]
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    if maps:
        specs += [kernel.map(), pl.BlockSpec((kernel.group, 1, 1), lambda g, b: (g, 0, 0))]
        of_maps = (maps[0].shape, (kernel.heads, 1, 1))
        outs += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in of_maps]
    call = pl.pallas_call(
        functools.partial(_backward_kernel, kernel),
        in_specs=[*kernel.inputs(), *kernel.maps(), kernel.block(kernel.queries)],
        out_specs=specs,
        out_shape=outs,
        scratch_shapes=kernel.scratch(arrays[0].dtype),
        **kernel.options(
            "fused_attention_backward",
            batch,
            5,
            [*arrays, *maps, d_out, *outs],
            in_turn=kernel.positional,
        ),
    )
    found = call(*kernel.operands(arrays), *maps, d_out)
    of_arrays = kernel.joined(found[: len(shapes)])
    if not maps:
        return of_arrays, ()
    d_positional, d_share = found[len(shapes) :]
    return of_arrays, (d_positional, d_share[:, 0, 0])


attend.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Returns the float32 product of two matrices, summed over an axis of each."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _softmax(q: Array, k: Array, scale: float) -> Array:
    """Returns softmax(q k^T scale): (M, K), (N, K) -> (M, N), float32."""
    scores = _dot(q, k, (1, 1)) * scale
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights * (1.0 / weights.sum(axis=-1, keepdims=True))


def _forward_kernel(kernel: Kernel, *refs: Any) -> None:
    """Computes the output of one image and one group of heads."""
    count = len(kernel.inputs())
    blocks, (*maps, out), scratch = refs[:count], refs[count:-3], refs[-3:]
    q_of, k_of, v_of = scratch
    first = pl.program_id(0) * kernel.group
    kernel.gather(blocks, scratch)

    def of_head(head: Array, _: None) -> None:
        attention, v = _softmax(q_of[head], k_of[head], kernel.scale), v_of[head]
        if maps:
            positional, share = maps
            share = share[first + head]
            attention = share * attention + positional[head]
        q_of[head] = _dot(attention.astype(v.dtype), v, (1, 0)).astype(v.dtype)

    jax.lax.fori_loop(0, kernel.group, of_head, None)
    for head in range(kernel.group):
        out[0, :, kernel.of_head(head)] = q_of[head]


def _backward_kernel(kernel: Kernel, *refs: Any) -> None:
    """Computes the gradients of one image and one group of heads; sums those of T and c.

    The gradients of q, k and v of a head take the place of q, k and v.
    """
    count, has_maps = len(kernel.inputs()), kernel.positional
    blocks, refs, scratch = refs[:count], refs[count:-4], refs[-4:]
    maps, (d_out, *d_blocks) = refs[: 2 * has_maps], refs[2 * has_maps :]
    d_blocks, d_maps = d_blocks[:count], d_blocks[count:]
    q_of, k_of, v_of, d_of = scratch
    first = pl.program_id(0) * kernel.group
    kernel.gather(blocks, scratch[:3])
    for head in range(kernel.group):
        d_of[head] = d_out[0, :, kernel.of_head(head)]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for d_map in d_maps:
            d_map[...] = jnp.zeros_like(d_map)

    def of_head(head: Array, _: None) -> None:
        q, k, v, d_head = q_of[head], k_of[head], v_of[head], d_of[head]
        attention = content = _softmax(q, k, kernel.scale)
        d_attention = _dot(d_head, v, (1, 1))
        mean = (d_attention * content).sum(axis=-1, keepdims=True)
        factor = kernel.scale
        if has_maps:
            (positional, share), (d_positional, d_share) = maps, d_maps
            share = share[first + head]
            attention = share * content + positional[head]
            factor *= share
            d_positional[head] += d_attention
            d_share[head] += mean.sum(axis=0, keepdims=True)
        d_scores = (factor * content * (d_attention - mean)).astype(q.dtype)
        q_of[head] = _dot(d_scores, k, (1, 0)).astype(q.dtype)
        k_of[head] = _dot(d_scores, q, (0, 0)).astype(k.dtype)
        v_of[head] = _dot(attention.astype(v.dtype), d_head, (0, 0)).astype(v.dtype)

    jax.lax.fori_loop(0, kernel.group, of_head, None)
    kernel.scatter(scratch[:3], d_blocks)
