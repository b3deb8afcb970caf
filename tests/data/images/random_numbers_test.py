"""Random numbers are functions of the seed and the draw alone, and uniform."""

import numpy as np
import pytest

from convit_jax.data.images.random_numbers import Given, uniforms


@pytest.mark.parametrize("width", [1, 3, 4, 13])
def test_a_row_depends_on_the_seed_and_the_draw_alone(width):
    whole = uniforms(3, range(100), width)
    assert whole.shape == (100, width)
    for start, stop in ((0, 1), (7, 20), (99, 100)):
        np.testing.assert_array_equal(uniforms(3, range(start, stop), width), whole[start:stop])
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(uniforms(4, range(100), width), whole).any()
    far = uniforms(3, range(2**50, 2**50 + 2), width)
    assert not np.isin(far, whole).any()
    np.testing.assert_array_equal(
        uniforms(-1, range(2), width), uniforms(2**64 - 1, range(2), width)
    )


def test_the_numbers_do_not_change_from_version_to_version():
    np.testing.assert_array_equal(
        uniforms(0, range(1), 3)[0], [0.8133540609793564, 0.7513314251083365, 0.6716490436969984]
    )
    np.testing.assert_array_equal(
        uniforms(5, range(1000, 1001), 2)[0], [0.4645439881300516, 0.796930798230207]
    )


def test_numbers_are_uniform_and_independent():
    numbers = uniforms(0, range(50_000), 6)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 2500) ** 2 / 2500).sum() < 43.8  # chi-squared of 19 degrees, 0.999
    together = np.corrcoef(np.hstack([numbers[:-1], numbers[1:]]).T)  # with the next draw's too
    assert np.abs(together - np.eye(12)).max() < 0.02  # 4.5 standard deviations


def test_given_numbers_become_normal_ranged_and_permuted():
    given = Given(uniforms(0, range(1), 60_000)[0].tolist())
    normal = np.array([given.standard_normal() for _ in range(20_000)])
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.03)
    assert (np.abs(normal) < 1.96).mean() == pytest.approx(0.95, abs=0.01)
    ranged = given.uniform(2, 4, 3000)
    assert ranged.min() >= 2
    assert ranged.max() < 4
    assert ranged.mean() == pytest.approx(3, abs=0.05)
    seen = [tuple(given.permutation(3)) for _ in range(3000)]
    assert {seen.count(order) > 400 for order in set(seen)} == {True}
    assert len(set(seen)) == 6
    assert Given([0.25]).random() == 0.25
    with pytest.raises(StopIteration):
        Given([]).random()
