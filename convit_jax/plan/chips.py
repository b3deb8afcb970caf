"""What a plan knows of its devices: figures of `convit_jax.model.chips`, or those of flags."""

import dataclasses

import jax
import jax.numpy as jnp

from convit_jax.model import chips
from convit_jax.plan.roofline import Peaks

_GB = 10**9


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
    interconnect: float | None = None,
) -> Chip:
    """Returns what is known of a device.

    Args:
      device: recognised by its `device_kind`.
      dtype: dtype of the matrix products, bfloat16 or float32.
      peak_tflops: peak in TFLOP/s, in place of the table's.
      bandwidth: bandwidth of the memory in GB/s, in place of the table's.
      interconnect: bandwidth to other devices in GB/s each way, in place of the table's.
    """
    known = chips.figures(device)
    flops = peak_tflops * 1e12 if peak_tflops else chips.peak_flops(device, dtype)
    speed = bandwidth * _GB if bandwidth else known.bandwidth
    sending = interconnect * _GB if interconnect else known.interconnect
    peaks = Peaks(flops, speed, sending) if flops and speed else None
    return Chip(device.device_kind, known.memory, peaks)
