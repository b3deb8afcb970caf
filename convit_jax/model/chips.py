"""Figures of accelerators by the names that JAX gives them: peaks, memory and interconnect.

The figures are the vendors'. They are for one JAX device: a GPU, or a TPU chip; on TPU v2 and v3
half a chip.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp

_GIB, _GB = 2**30, 10**9


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of a device. None is what is not known.

    Attributes:
      kind: pattern of its `device_kind`.
      bfloat16: peak FLOPs per second of dense matrix products of bfloat16.
      float32: the same of float32. The figure assumes JAX's default precision, which is TF32 on
        NVIDIA since Ampere and bfloat16 on TPU (docs.jax.dev/en/latest/201/precision.html).
      memory: its memory in bytes.
      bandwidth: bytes a second that the memory reads and writes.
      interconnect: bytes a second that the device can send to others; it can receive as many at
        the same time.
      vmem: MiB of a TPU's vector memory (`pltpu.get_tpu_info_for_chip` of JAX).
    """

    kind: str
    bfloat16: float | None = None
    float32: float | None = None
    memory: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    vmem: float | None = None


# Cloud TPU's pages write GB for the GiB of a TPU. They give the bandwidth of the interconnect for
# both directions together, as NVIDIA does for NVLink, so half of it is here. NVIDIA's FLOPs "with
# sparsity" are twice the dense ones.
_DEVICES = (
    # Jouppi et al. 2020, doi:10.1145/3360307: a chip has 46 TFLOP/s, 16 GiB and 700 GB/s.
    Figures("TPU v2", 23e12, 23e12, 8 * _GIB, 350 * _GB),
    # cloud.google.com/tpu/docs/v3: a chip has 123 TFLOP/s, 32 GiB and 900 GB/s.
    Figures("TPU v3", 61.5e12, 61.5e12, 16 * _GIB, 450 * _GB),
    # cloud.google.com/tpu/docs/v4; Jouppi et al. 2023, arXiv:2304.01433: 6 links of 50 GB/s.
    Figures("TPU v4", 275e12, 275e12, 32 * _GIB, 1200 * _GB, 300 * _GB, vmem=16),
    # cloud.google.com/tpu/docs/v5e: 400 GB/s in both directions.
    Figures("TPU v5( lite|e)", 197e12, 197e12, 16 * _GIB, 819 * _GB, 200 * _GB, vmem=128),
    # cloud.google.com/tpu/docs/v5p: 1,200 GB/s in both directions.
    Figures("TPU v5p?", 459e12, 459e12, 95 * _GIB, 2765 * _GB, 600 * _GB, vmem=64),
    # cloud.google.com/tpu/docs/v6e: 800 GB/s in both directions.
    Figures("TPU v6( lite|e)", 918e12, 918e12, 32 * _GIB, 1638 * _GB, 400 * _GB, vmem=128),
    # V100 data sheet, SXM2 and PCIe. A V100 has no bfloat16 units.
    Figures(r"(Tesla|NVIDIA) V100-SXM2-\d+GB", None, 15.7e12),
    Figures(r"(Tesla|NVIDIA) V100-PCIE-\d+GB", None, 14e12),
    # A100 data sheet: SXM and PCIe have the same FLOPs. NVLink of SXM: 600 GB/s.
    Figures("(NVIDIA )?A100-SXM4-80GB", 312e12, 156e12, 80 * _GB, 2039 * _GB, 300 * _GB),
    Figures(r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312e12, 156e12),
    # L4 data sheet: 242 and 120 TFLOP/s with sparsity; PCIe of 64 GB/s.
    Figures("NVIDIA L4", 121e12, 60e12, 24 * _GB, 300 * _GB, 32 * _GB),
    # H100 data sheet: PCIe 1,513 and 756 TFLOP/s with sparsity; SXM 1,979 and 989, NVLink 900 GB/s.
    Figures("NVIDIA H100 PCIe", 756e12, 378e12),
    Figures("NVIDIA H100 80GB HBM3", 989e12, 494e12, 80 * _GB, 3350 * _GB, 450 * _GB),
    # H200 data sheet, SXM: 1,979 and 989 TFLOP/s with sparsity; NVLink 900 GB/s.
    Figures("NVIDIA H200", 989e12, 494e12, 141 * _GB, 4800 * _GB, 450 * _GB),
    # HGX B200 data sheet: 4,500 and 2,200 TFLOP/s with sparsity.
    Figures("NVIDIA B200", 2250e12, 1100e12),
)


def figures(device: jax.Device) -> Figures:
    """Returns what is known of a device, by its `device_kind`.

    A slice of a GPU (MIG) reports another kind than the GPU, so nothing is known of it.
    """
    found = (f for f in _DEVICES if re.fullmatch(f.kind, device.device_kind))
    return next(found, Figures(device.device_kind))


def peak_flops(device: jax.Device, dtype: jnp.dtype) -> float | None:
    """Returns the peak FLOPs per second of dense matrix products on a device; None if not known.

    Args:
      device: recognised by its `device_kind`.
      dtype: dtype of the inputs, bfloat16 or float32. The figure for float32 holds at JAX's
        default precision; raising `jax_default_matmul_precision` lowers the real peak.
    """
    found, name = figures(device), jnp.dtype(dtype).name
    return {"bfloat16": found.bfloat16, "float32": found.float32}.get(name)
