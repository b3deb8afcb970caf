"""The order of small data sets is computed at once, and is that of grain's index_shuffle."""

import grain
import numpy as np
import pytest

from convit_jax.data.batches import shuffle


@pytest.mark.parametrize("size", [1, 2, 10, 100, 1437, 50_000, 65_535, 65_536])
def test_the_order_is_grains(size):
    rng = np.random.default_rng(size)
    for seed in (0, 1, 2**32 - 1, *rng.integers(2**32, size=2).tolist()):
        order = shuffle.order(size, seed)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
        if size > 1:  # index_shuffle needs two images
            for place in rng.integers(size, size=3).tolist():
                expected = grain.experimental.index_shuffle(
                    place, max_index=size - 1, seed=seed, rounds=4
                )
                assert order[place] == shuffle.shuffled(place, size, seed) == expected


def test_large_data_sets_are_shuffled_index_by_index():
    places = np.array([0, 5, 1_281_166])
    one = [shuffle.shuffled(int(place), 1_281_167, 7) for place in places]
    np.testing.assert_array_equal(shuffle.shuffled_places(places, 1_281_167, 7), one)
    assert len(set(one)) == 3


def test_the_order_does_not_change_from_version_to_version():
    assert shuffle.order(10, 0).tolist() == [0, 4, 6, 7, 8, 3, 1, 9, 5, 2]
    assert shuffle.order(1437, 12345)[:8].tolist() == [681, 809, 1025, 894, 194, 6, 1235, 1271]
