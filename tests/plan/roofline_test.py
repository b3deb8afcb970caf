"""The bound of a step's time, beside cases computed by hand."""

import pytest

from convit_jax.plan.roofline import Feeding, Peaks, bound

V5E = Peaks(flops=197e12, bandwidth=819e9, interconnect=200e9)


def test_a_step_takes_as_long_as_its_slower_part():
    # 394 TFLOP at 197 TFLOP/s are 2 s, and 819 GB at 819 GB/s are 1 s.
    found = bound(394e12, 819e9, V5E, images=1024, devices=16, bytes_sent=600e9)
    assert (found.flops_seconds, found.bytes_seconds) == pytest.approx((2, 1))
    assert found.seconds == pytest.approx(2)
    assert found.sent_seconds == pytest.approx(3)  # apart: it may overlap with the rest
    assert found.limit == "matrix products"
    assert found.images_per_second == pytest.approx(512)
    assert found.hours(3600) == pytest.approx(2)
    assert found.device_hours(3600) == pytest.approx(32)
    # The model needs half of the products, so half of the peak is in vain.
    assert found.mfu(197e12, V5E) == pytest.approx(0.5)

    found = bound(19.7e12, 8190e9, V5E, images=10, devices=1)  # 0.1 s and 10 s
    assert (found.limit, found.sent_seconds) == ("memory", 0)
    assert bound(1, 1, Peaks(1, 1), images=10, devices=1).sent_seconds is None
    assert found.images_per_second == pytest.approx(1)
    assert found.mfu(19.7e12, V5E) == pytest.approx(0.01)


def test_hosts_share_the_images_and_cores_are_whole():
    assert Feeding.of(8000, hosts=4, rate=536) == Feeding(2000, 4)  # 3.73 cores
    assert Feeding.of(536, hosts=1, rate=536).cores == 1
