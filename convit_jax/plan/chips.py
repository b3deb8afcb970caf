"""Memory and bandwidth of devices. `convit_jax.model.flops` has their FLOPs."""

import dataclasses
import re

import jax
import jax.numpy as jnp

from convit_jax.model.flops import peak_flops
from convit_jax.plan.roofline import Peaks

_GIB, _GB = 2**30, 10**9

# A pattern of the `device_kind`, the memory in bytes, and the bytes a second that it reads and
# writes. Cloud TPU's figures are for a chip; on v2 and v3 a JAX device is half a chip. Its pages
# write GB for the GiB of a TPU.
_MEMORIES: tuple[tuple[str, float, float], ...] = (
    (r"TPU v2", 8 * _GIB, 350 * _GB),  # Jouppi et al. 2020, doi:10.1145/3360307: 16, 700 a chip
    (r"TPU v3", 16 * _GIB, 450 * _GB),  # cloud.google.com/tpu/docs/v3: 32 GiB, 900 GB/s a chip
    (r"TPU v4", 32 * _GIB, 1200 * _GB),  # cloud.google.com/tpu/docs/v4
    (r"TPU v5( lite|e)", 16 * _GIB, 819 * _GB),  # cloud.google.com/tpu/docs/v5e
    (r"TPU v5p?", 95 * _GIB, 2765 * _GB),  # cloud.google.com/tpu/docs/v5p
    (r"TPU v6( lite|e)", 32 * _GIB, 1638 * _GB),  # cloud.google.com/tpu/docs/v6e
    (r"(NVIDIA )?A100-SXM4-80GB", 80 * _GB, 2039 * _GB),  # A100 data sheet
    (r"NVIDIA L4", 24 * _GB, 300 * _GB),  # L4 data sheet
    (r"NVIDIA H100 80GB HBM3", 80 * _GB, 3350 * _GB),  # H100 data sheet, SXM
    (r"NVIDIA H200", 141 * _GB, 4800 * _GB),  # H200 data sheet, SXM
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of a device.

    Attributes:
      kind: JAX's name of it.
      memory: its memory in bytes; None if it is not known.
      peaks: its peaks; None if they are not known.
    """

    kind: str
    memory: float | None
    peaks: Peaks | None


def find(
    device: jax.Device,
    dtype: jnp.dtype,
    peak_tflops: float | None = None,
    bandwidth: float | None = None,
) -> Chip:
    """Returns what is known of a device.

    Args:
      device: recognised by its `device_kind`.
      dtype: dtype of the matrix products, bfloat16 or float32.
      peak_tflops: peak in TFLOP/s, in place of the table's.
      bandwidth: bandwidth of the memory in GB/s, in place of the table's.
    """
    memory = speed = None
    for kind, *of_kind in _MEMORIES:
        if re.fullmatch(kind, device.device_kind):
            memory, speed = of_kind
            break
    flops = peak_tflops * 1e12 if peak_tflops else peak_flops(device, dtype)
    speed = bandwidth * _GB if bandwidth else speed
    peaks = Peaks(flops, speed) if flops and speed else None
    return Chip(device.device_kind, memory, peaks)
