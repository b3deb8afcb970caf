"""RandAugment: every operation and the distribution of the draws, compared with timm's."""

import collections

import numpy as np
from PIL import Image
import pytest
import reference
from scipy import stats
from sklearn import datasets

from convit_jax.data.images import randaugment

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
BLENDED = ("Color", "Sharpness")  # the others use tables and are exact
SIZES = ((224, 224), (160, 197))  # height, width


def timm_names():
    from timm.data import auto_augment

    return dict(zip(randaugment.NAMES, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


def photo(size):
    image = Image.fromarray(datasets.load_sample_image("china.jpg"))
    image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return image.point([15 + level * 4 // 5 for level in range(256)] * 3)  # room for AutoContrast


def timm_op(name, picture, magnitude, negate, monkeypatch):
    """(arguments, pixels) of timm's operation at a magnitude."""
    reference.import_timm()
    from timm.data import auto_augment

    theirs = timm_names()[name]
    level = auto_augment.LEVEL_TO_ARG[theirs]
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if negate else 0.1)
    arguments = level(magnitude, {}) if level else ()
    out = auto_augment.NAME_TO_OP[theirs](
        picture, *arguments, fillcolor=randaugment.FILL, resample=Image.Resampling.BICUBIC
    )
    return arguments, np.asarray(out)


@pytest.mark.parametrize("name", randaugment.NAMES)
def test_operations_are_those_of_timm(name, monkeypatch):
    for size in SIZES:
        picture = photo(size)
        pixels = np.array(picture)
        for magnitude in (2.3, 6.0, 9.4):
            for negate in (False, True):
                arguments, expected = timm_op(name, picture, magnitude, negate, monkeypatch)
                value = randaugment.argument(name, magnitude, negate)
                assert value == (arguments[0] if arguments else None)
                exact = randaugment.apply_exact(picture, (name, value))
                np.testing.assert_array_equal(np.asarray(exact), expected)
                fast = randaugment.apply_fast(pixels, (name, value))
                assert fast.dtype == np.uint8
                assert fast.shape == expected.shape
                error = np.abs(fast - expected.astype(int)).mean()
                # Warps: OpenCV's bicubic kernel has a = -0.75 and 1/32 pixel, Pillow's a = -1.
                allowed = 1.0 if name in GEOMETRIC else 0.5 if name in BLENDED else 0
                assert error <= allowed, (size, magnitude, negate)
                assert (expected != pixels).any()
        np.testing.assert_array_equal(pixels, np.asarray(picture))  # left as it was


@pytest.mark.parametrize("name", GEOMETRIC)
def test_fill_has_the_same_shape(name, monkeypatch):
    for height, width in SIZES:
        pixels = np.full((height, width, 3), 255, np.uint8)
        for magnitude in (0.0, 2.3, 6.0, 10.0):
            for negate in (False, True):
                _, expected = timm_op(name, Image.fromarray(pixels), magnitude, negate, monkeypatch)
                value = randaugment.argument(name, magnitude, negate)
                fast = randaugment.apply_fast(pixels, (name, value))
                np.testing.assert_array_equal(fast, expected)
                filled = (fast == randaugment.FILL).all(axis=-1).mean()
                assert (filled > 0.01) == (magnitude > 1)


@pytest.mark.parametrize("name", ["Posterize", "Solarize", "AutoContrast", "Equalize"])
def test_operations_at_their_limits(name, monkeypatch):
    flat = np.full((6, 5, 3), 77, np.uint8)
    narrow = np.arange(90, dtype=np.uint8).reshape(6, 5, 3) // 3 + 100
    for pixels in (flat, narrow):
        for magnitude in (0.0, 10.0):
            value = randaugment.argument(name, magnitude, False)
            if (name, value) == ("Posterize", 0):  # Pillow 13 refuses 0 bits
                expected = np.zeros_like(pixels)
            else:
                picture = Image.fromarray(pixels)
                _, expected = timm_op(name, picture, magnitude, False, monkeypatch)
            for apply in (randaugment.apply_exact, randaugment.apply_fast):
                image = Image.fromarray(pixels) if apply is randaugment.apply_exact else pixels
                np.testing.assert_array_equal(np.asarray(apply(image, (name, value))), expected)


def timm_draws(count):
    """Returns, for each image, the list of (operation, magnitude) that timm applies."""
    reference.import_timm()
    import random

    from timm.data import auto_augment

    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    images = []
    for index, op in enumerate(transform.ops):
        op.level_fn = lambda magnitude, _: (magnitude,)
        op.aug_fn = lambda image, m, index=index, **_: images[-1].append((index, m)) or image
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm draws from it
    for _ in range(count):
        images.append([])
        transform(None)
    return images


def our_draws(count, monkeypatch):
    monkeypatch.setattr(randaugment, "argument", lambda name, level, negate: (level, negate))
    rng = np.random.default_rng(0)
    return [randaugment.draw(rng, 2, 9.0, 0.5) for _ in range(count)]


def p_value(left, right):
    """P-value of a chi-square test that two samples have the same discrete distribution."""
    counts = collections.Counter(left), collections.Counter(right)
    values = sorted(counts[0] | counts[1])
    return stats.chi2_contingency([[c[value] for value in values] for c in counts]).pvalue


def test_draws_are_distributed_as_those_of_timm(monkeypatch):
    theirs, ours = timm_draws(20_000), our_draws(20_000, monkeypatch)
    index = {name: i for i, name in enumerate(randaugment.NAMES)}
    flat = [(index[name], level, negate) for ops in ours for name, (level, negate) in ops]
    assert p_value(map(len, theirs), map(len, ours)) > 0.01
    timm_flat = [op for ops in theirs for op in ops]
    assert p_value([i for i, _ in timm_flat], [i for i, _, _ in flat]) > 0.01
    # Operations are drawn with replacement, so one image in 15 gets the same one twice.
    twice = [[len({name for name, _ in ops}) for ops in d if len(ops) == 2] for d in (theirs, ours)]
    assert p_value(*twice) > 0.01
    # Magnitudes that are clipped to 10 have their own bin.
    edges = [8.0, 8.25, 8.5, 8.75, 9.0, 9.25, 9.5, 9.75, 10.0]
    levels = [np.digitize([op[1] for op in draws], edges) for draws in (timm_flat, flat)]
    assert p_value(levels[0].tolist(), levels[1].tolist()) > 0.01
    assert (levels[1] == len(edges)).mean() == pytest.approx(stats.norm.sf(2), abs=0.004)
    signs = np.array([negate for _, _, negate in flat])
    assert signs.mean() == pytest.approx(0.5, abs=3 * 0.5 / len(signs) ** 0.5)


def test_draws_follow_count_magnitude_and_std(monkeypatch):
    monkeypatch.setattr(randaugment, "argument", lambda name, level, negate: level)
    rng = np.random.default_rng(0)
    draws = [randaugment.draw(rng, 5, 4.0, 0.0) for _ in range(400)]
    assert {level for ops in draws for _, level in ops} == {4.0}
    assert max(map(len, draws)) == 5
    assert np.mean([len(ops) for ops in draws]) == pytest.approx(2.5, abs=0.2)
    wide = [level for _ in range(400) for _, level in randaugment.draw(rng, 2, 5.0, 20.0)]
    assert (min(wide), max(wide)) == (0, 10)
    assert randaugment.draw(rng, 0, 9.0, 0.5) == []
