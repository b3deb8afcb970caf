"""What is known of devices, by the names that JAX gives them."""

import types

import jax
import jax.numpy as jnp
import pytest

from convit_jax.model import chips


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", None, None),
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA B200", 2250, 1100),
        ("TPU v2", 23, 23),
        ("TPU v3", 61.5, 61.5),
        ("TPU v4", 275, 275),
        ("TPU v4 lite", None, None),
        ("TPU v5 lite", 197, 197),
        ("TPU v5", 459, 459),
        ("TPU v5p", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("cpu", None, None),
    ],
)
def test_peaks_of_devices(kind, bfloat16, float32):
    device = types.SimpleNamespace(device_kind=kind)
    for dtype, tera in ((jnp.bfloat16, bfloat16), (jnp.float32, float32), (jnp.float64, None)):
        peak = chips.peak_flops(device, dtype)
        assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_known_peak():
    assert chips.peak_flops(jax.devices("cpu")[0], jnp.dtype("float32")) is None
