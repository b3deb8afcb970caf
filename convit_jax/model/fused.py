"""Attention by one fused TPU kernel: where it runs, and how it is called.

fused_kernel.py has the kernel. It mixes content map and positional map in the chip's vector memory
(VMEM), and no map leaves the chip. A group of heads is computed at a time, all of them if their
maps fit into VMEM at once. Fewer must have a multiple of 128 channels together.

No TPU has run the kernel so far. Tests interpret it on a CPU, and the TPU's compiler accepts it.

Shapes: B batch, N tokens, M queries, H heads, K width of a head, D = H K, G heads of a group,
R rows and C columns of the patch grid.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from convit_jax.model import chips
from convit_jax.model.positional import Grid, positional_factors, positional_map

Array = jax.Array

# (function, number of arguments that are split over the batch) -> the function, split over devices.
Split = Callable[[Callable[..., Array], int], Callable[..., Array]]

_LEAST_VMEM = 16  # MiB that every TPU has
_SHARE = 15 / 16  # of the VMEM is for the kernel; the estimate is rough
_LANES, _SUBLANES = 128, 8  # a register is 8 x 128 numbers of 32 bits
_MAPS = 6  # maps of a head, (M, N) float32, that the backward pass holds at a time
_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Fused:
    """`attention="fused"` with options: how the kernel is run.

    A name cannot say over which devices a batch is split. The compiler does not split a kernel by
    itself, and JAX refuses one that would need it ("Mosaic kernels cannot be automatically
    partitioned"). `split` does it, so that the model knows no mesh.

    Attributes:
      split: splits a function over the batch, see `convit_jax.parallel.sharding.split_batch`; None
        leaves it whole, for one device.
      memory: MiB of VMEM that the chip has, see `memory_of`.
      interpret: whether the kernel is interpreted, which needs no TPU and is slow: for tests.
    """

    split: Split | None = None
    memory: float = _LEAST_VMEM
    interpret: Any = False

    def __str__(self) -> str:
        return "fused"

    def gpsa(
        self, qk: Array, v: Array, weights: Array, gates: Array, *, grid: Grid, scale: float
    ) -> Array:
        """Computes gated positional self-attention.

        Args:
          qk: (B, N, 2 D), queries and then keys.
          v: (B, N, D).
          weights: (3, H), the positional weights.
          gates: (H,), before the sigmoid.
          grid: (R, C), the patch grid.
          scale: factor of the content scores.

        Returns:
          (B, N, D) in v's dtype.

        Raises:
          ValueError: if the maps do not fit into VMEM.
        """

        def of_batch(qk: Array, v: Array, weights: Array, gates: Array) -> Array:
            # The small arrays come in here, so that only their gradients are summed over devices.
            share = jax.nn.sigmoid(gates.astype(jnp.float32))
            positional = positional_map(*positional_factors(weights, grid))
            positional = share[:, None, None] * positional
            return self._attend((qk, v), (positional, 1.0 - share), gates.shape[0], scale)

        return self._over_devices(of_batch, 2)(qk, v, weights, gates)

    def self_attention(
        self, qkv: Array, *, heads: int, scale: float, queries: int | None = None
    ) -> Array:
        """Computes plain self-attention.

        Args:
          qkv: (B, N, 3 D), queries, keys and values.
          heads: H.
          scale: factor of the scores.
          queries: M, number of tokens that attend, counted from the first; None means all.

        Returns:
          (B, M, D) in the dtype of `qkv`.

        Raises:
          ValueError: if the maps do not fit into VMEM.
        """

        def of_batch(qkv: Array) -> Array:
            return self._attend((qkv,), (), heads, scale, queries)

        return self._over_devices(of_batch, 1)(qkv)

    def _over_devices(self, function: Callable[..., Array], batched: int) -> Callable[..., Array]:
        return function if self.split is None else self.split(function, batched)

    def _attend(
        self,
        arrays: tuple[Array, ...],
        maps: tuple[Array, ...],
        heads: int,
        scale: float,
        queries: int | None = None,
    ) -> Array:
        from convit_jax.model import fused_kernel  # importing Pallas takes a while

        tokens, dtype = arrays[0].shape[1], arrays[0].dtype
        width = sum(x.shape[2] for x in arrays) // 3 // heads
        group = group_of(heads, width, tokens, bool(maps), dtype, queries, self.memory)
        if group is None:
            raise ValueError(
                f"attention='fused': expected maps that fit into {self.memory} MiB of VMEM and "
                f"{_names(_DTYPES)}, got {tokens} tokens, {heads} heads of {width} channels and "
                f"{dtype}: expected auto, xla or chunked"
            )
        kernel = fused_kernel.Kernel(
            heads, width, tokens, queries or tokens, scale, bool(maps), group, self.interpret
        )
        return fused_kernel.attend(kernel, arrays, maps)


def is_fused(attention: Any) -> bool:
    """Returns whether `attention` is "fused" or a `Fused`."""
    return attention == "fused" or isinstance(attention, Fused)


def of(attention: Any) -> Fused | None:
    """Returns how to run the kernel if `attention` is "fused" or a `Fused`, else None.

    Raises:
      ValueError: if `attention` is "fused" and JAX's backend is no TPU.
    """
    if attention == "fused":
        check_backend(jax.default_backend())
        return Fused()
    return attention if isinstance(attention, Fused) else None


def check_backend(backend: str) -> None:
    """Raises ValueError unless the backend is a TPU."""
    if backend != "tpu":
        raise ValueError(
            f"attention='fused' needs a TPU, got {backend}: expected auto, xla or chunked"
        )


def memory_of(device: jax.Device) -> float:
    """Returns the MiB of VMEM of a device, or those of the smallest TPU if it is not known."""
    return chips.figures(device).vmem or _LEAST_VMEM


def fits(heads: int, width: int, tokens: int, dtype: Any) -> bool:
    """Returns whether the kernel takes all layers of a ConViT or DeiT with N patches on any TPU.

    GPSA has N patches and a positional map; plain self-attention has N + 1 tokens.
    """
    cases = ((tokens, True), (tokens + 1, False))
    return all(group_of(heads, width, *case, dtype) is not None for case in cases)


def group_of(
    heads: int,
    width: int,
    tokens: int,
    positional: bool,
    dtype: Any,
    queries: int | None = None,
    memory: float = _LEAST_VMEM,
) -> int | None:
    """Returns G, the largest number of heads that the kernel takes at a time; None if none fits.

    Args:
      heads: H.
      width: K.
      tokens: N.
      positional: whether there is a positional map.
      dtype: dtype of queries, keys and values.
      queries: M; None means N.
      memory: MiB of VMEM.
    """
    if jnp.dtype(dtype) not in _DTYPES:
        return None
    for group in range(heads, 0, -1):
        aligned = group == heads or group * width % _LANES == 0
        if heads % group == 0 and aligned:
            needs = vmem(heads, group, width, tokens, queries or tokens, positional, dtype)
            if needs <= _SHARE * memory * 2**20:
                return group
    return None


def vmem(
    heads: int, group: int, width: int, tokens: int, queries: int, positional: bool, dtype: Any
) -> int:
    """Returns about how many bytes of VMEM the backward pass needs with G heads at a time."""
    columns = [group, group, group]
    if group == heads:
        columns = [2 * heads, heads] if positional else [3 * heads]
    # Blocks of q, k, v and of their gradients. One image is copied while another is worked on, so
    # there are two of each.
    itemsize = jnp.dtype(dtype).itemsize
    blocks = 4 * sum(_padded(tokens, n * width, itemsize) for n in columns)
    blocks += 2 * _padded(queries, group * width, itemsize)
    # q, k, v and the output's gradient once more, each head by itself.
    blocks += 4 * group * _padded(tokens, width, itemsize)
    # The positional map of each head and its gradient.
    maps = (2 * group if positional else 0) + _MAPS
    return blocks + maps * _padded(queries, tokens, 4)


def _padded(rows: int, columns: int, itemsize: int) -> int:
    """Returns the bytes of an array in VMEM, which consists of whole registers."""
    sublanes = _SUBLANES * 4 // itemsize
    rows, columns = -(-rows // sublanes) * sublanes, -(-columns // _LANES) * _LANES
    return rows * columns * itemsize


def _names(dtypes: tuple[Any, ...]) -> str:
    return " or ".join(dtype.name for dtype in dtypes)
