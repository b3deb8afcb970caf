"""What a plan knows of its devices: the table's figures, or those of flags."""

import types

import jax.numpy as jnp
import pytest

from convit_jax.plan import chips
from convit_jax.plan.roofline import Peaks


@pytest.mark.parametrize(
    ("kind", "gib", "tflops", "gb_per_second", "each_way"),
    [
        ("TPU v4", 32, 275, 1200, 300),
        ("TPU v5 lite", 16, 197, 819, 200),
        ("TPU v5", 95, 459, 2765, 600),
        ("TPU v6 lite", 32, 918, 1638, 400),
    ],
)
def test_tpus_are_known(kind, gib, tflops, gb_per_second, each_way):
    found = chips.find(types.SimpleNamespace(device_kind=kind), jnp.bfloat16)
    assert found.memory == gib * 2**30
    assert found.peaks == Peaks(tflops * 1e12, gb_per_second * 1e9, each_way * 1e9)


def test_flags_give_what_is_not_known():
    unknown = types.SimpleNamespace(device_kind="TPU v99")
    assert chips.find(unknown, jnp.bfloat16) == chips.Chip("TPU v99", None, None)
    assert chips.find(unknown, jnp.bfloat16, peak_tflops=2).peaks is None
    assert chips.find(unknown, jnp.bfloat16, 2, 3).peaks == Peaks(2e12, 3e9)
    assert chips.find(unknown, jnp.bfloat16, 2, 3, 4).peaks == Peaks(2e12, 3e9, 4e9)
