"""Erasing, mixup and CutMix compared with timm's; distributions, groups and eight devices."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import import_timm, timm_images
from scipy import stats

from convit_jax import recipe
from convit_jax.parallel import sharding
from convit_jax.train import augmentation

RECIPE = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "group_size": 128}
OPTIONS = {**RECIPE, "smoothing": 0.1, "erase_prob": 0.25, "erase_mode": "pixel"}
# For tests of distributions with a fixed seed; a correct one fails with one seed in a thousand.
P_VALUE = 1e-3


def partners(batch: int) -> np.ndarray:
    """Returns the index of every image's partner, by the rule of the docstring."""
    i = np.arange(batch)
    return (i + batch // 2) % batch if batch % 8 else i // 8 * 8 + (i + 4) % 8


def jit_mix(**options):
    return jax.jit(functools.partial(augmentation.mix, **{**RECIPE, **options}))


def observe(mix, batch: int, height: int, width: int, key: jax.Array):
    """Returns what `mix` drew: the share left of every image at every pixel, and of its label.

    Of each pair of partners, one has pixels and label 0 and the other 1.
    """
    ones = (np.arange(batch) < partners(batch)).astype(np.float32)
    images = np.broadcast_to(ones[:, None, None, None], (batch, height, width, 1))
    images, labels = mix(images, np.eye(5, dtype=np.float32)[ones.astype(int)], key)
    images, labels = np.asarray(images)[..., 0], np.asarray(labels)[:, 1]
    first = ones.astype(bool)
    return np.where(first[:, None, None], images, 1 - images), np.where(first, labels, 1 - labels)


def bounds(inside: np.ndarray) -> np.ndarray:
    """(n, H, W) bool, each a non-empty rectangle -> (n, 4): top, bottom, left, right."""
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    edges = [rows.argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)]
    edges += [columns.argmax(1), columns.shape[1] - columns[:, ::-1].argmax(1)]
    boxes = np.stack(edges, axis=1)
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    np.testing.assert_array_equal(inside.sum(axis=(1, 2)), areas)
    return boxes


def near(count: int, total: int, prob: float) -> bool:
    return abs(count - total * prob) < 4 * math.sqrt(total * prob * (1 - prob))


# Mixing


@pytest.mark.parametrize("batch", [8, 24, 32, 7, 12, 20, 2, 1])
def test_partners(batch):
    found = np.asarray(augmentation.partner(jnp.arange(batch)))
    np.testing.assert_array_equal(found, partners(batch))
    assert sorted(found) == list(range(batch))
    if batch >= 7:  # never copies of an image by repeated augmentation
        assert np.abs(found - np.arange(batch)).min() >= 3


@pytest.mark.parametrize(("batch", "group_size"), [(40, 16), (20, 128)])
def test_mix_equals_timms(batch, group_size, monkeypatch):
    """Each group has one kind of mixing, one lambda and one box, and no two groups have the same.

    timm gets a group and then its partners in reverse order, so that its flip makes our pairs.
    """
    import_timm()
    import timm.data.mixup as theirs
    import torch

    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, 9, 14, 1)).astype(np.float32)
    labels = rng.integers(0, 5, batch)
    soft = augmentation.soft_labels(labels, 5, 0.1)
    mix, kinds, lams = jit_mix(group_size=group_size), set(), []
    for seed in range(4):
        key = jax.random.key(seed)
        left, share = observe(mix, batch, 9, 14, key)
        mixed, mixed_labels = map(np.asarray, mix(images, soft, key))
        groups = -(-batch // group_size)
        for start in range(groups):
            group = np.arange(start, batch, groups)
            order = np.concatenate([group, partners(batch)[group][::-1]])
            cut = bool(np.isin(left[start], (0, 1)).all())
            kinds.add(cut)
            box = bounds(left[[start]] == 0)[0] if cut else None
            lam = 0.5 if cut else float(share[start])  # timm corrects CutMix's itself
            lams += [] if cut else [lam]
            peer = theirs.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
            monkeypatch.setattr(peer, "_params_per_batch", lambda lam=lam, cut=cut: (lam, cut))
            monkeypatch.setattr(theirs, "rand_bbox", lambda *_, box=box, **__: box)
            x, y = peer(timm_images(images[order], torch), torch.tensor(labels[order]))
            x = x.numpy().transpose(0, 2, 3, 1)
            size = len(group)
            np.testing.assert_allclose(mixed[group], x[:size], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(mixed_labels[group], y.numpy()[:size], atol=1e-6)
    assert kinds == {False, True}
    assert len(set(lams)) == len(lams)


def test_cutmix_boxes_equal_timms(monkeypatch):
    import_timm()
    from timm.data.mixup import rand_bbox

    rng = np.random.default_rng(0)
    lam = np.concatenate([[0.0, 1.0, 0.75], rng.random(500)]).astype(np.float32)
    for height, width in ((37, 50), (224, 224)):
        y, x = (rng.integers(0, side, lam.size) for side in (height, width))
        ours = jax.jit(augmentation.cutmix_box, static_argnums=(3, 4))(lam, y, x, height, width)
        for i in range(lam.size):
            centre = iter([y[i], x[i]])
            monkeypatch.setattr(np.random, "randint", lambda *_, c=centre, **__: next(c))
            theirs = rand_bbox((3, height, width), float(lam[i]))
            assert tuple(int(edge[i]) for edge in ours) == tuple(map(int, theirs)), lam[i]


def test_distribution_of_mixing():
    """4096 groups of one image, compared with scipy's Beta distribution and timm's boxes."""
    import_timm()
    from timm.data.mixup import rand_bbox

    batch, height, width = 4096, 24, 32
    mix = jit_mix(mixup=0.3, cutmix=2.0, prob=0.75, switch_prob=0.3, group_size=1)
    left, share = observe(mix, batch, height, width, jax.random.key(1))
    cut, untouched = (left == 0).any(axis=(1, 2)), (left == 1).all(axis=(1, 2))
    blended = ~cut & ~untouched
    assert near(untouched.sum(), batch, 0.25)
    assert near(cut.sum(), batch, 0.75 * 0.3)

    lam = share[blended]
    np.testing.assert_allclose(
        left[blended], np.broadcast_to(lam[:, None, None], left[blended].shape), atol=1e-6
    )
    assert stats.kstest(lam, stats.beta(0.3, 0.3).cdf).pvalue > P_VALUE

    boxes = bounds(left[cut] == 0)
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    np.testing.assert_allclose(share[cut], 1 - areas / (height * width), atol=1e-6)
    for low, high, side in ((0, 1, height), (2, 3, width)):  # odd and even centres alike
        whole = boxes[(boxes[:, low] > 0) & (boxes[:, high] < side)]
        assert near(((whole[:, low] + whole[:, high]) // 2 % 2).sum(), len(whole), 0.5)
    np.random.seed(0)  # noqa: NPY002 (what timm draws from)
    theirs = np.array(
        [rand_bbox((1, height, width), lam) for lam in np.random.beta(2, 2, 4096)]  # noqa: NPY002
    )
    for i in range(4):
        assert stats.ks_2samp(boxes[:, i], theirs[:, i]).pvalue > P_VALUE
    their_areas = (theirs[:, 1] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 2])
    assert stats.ks_2samp(areas, their_areas).pvalue > P_VALUE


def test_the_copies_of_an_image_are_mixed_otherwise():
    """The three copies that repeated augmentation puts in a row get different draws, as in DeiT."""
    draws = []
    mix = jit_mix(cutmix=0.0, group_size=128)
    for seed in range(64):
        _, share = observe(mix, 1024, 2, 2, jax.random.key(seed))
        assert len(np.unique(share)) == 8  # 1,024 images in groups of 128
        assert (share[1:] != share[:-1]).all()
        assert (share[2:] != share[:-2]).all()
        draws.append(share[:8])
    # Each image's lambda is Beta(0.8, 0.8), whatever its group.
    assert stats.kstest(np.concatenate(draws), stats.beta(0.8, 0.8).cdf).pvalue > P_VALUE


@pytest.mark.parametrize(("alphas", "cut"), [((0.8, 0.0), False), ((0.0, 1.0), True)])
def test_one_of_the_two_alone(alphas, cut):
    mix = jit_mix(mixup=alphas[0], cutmix=alphas[1], group_size=1)
    left, _ = observe(mix, 32, 16, 16, jax.random.key(0))
    np.testing.assert_array_equal(np.isin(left, (0, 1)).all(axis=(1, 2)), cut)


def test_off_is_free():
    images, labels, key = jnp.ones((8, 4, 4, 3)), jnp.ones((8, 5)), jax.random.key(0)
    assert augmentation.random_erase(images, key, prob=0.0, mode="pixel") is images
    for off in ({"mixup": 0.0, "cutmix": 0.0}, {"prob": 0.0}):
        assert augmentation.mix(images, labels, key, **{**RECIPE, **off}) == (images, labels)


def test_integers_stay_in_range():
    """The largest float32 draw is 1 - 2^-23; its product with n must not round to n."""
    count = jnp.arange(1, 5000)
    np.testing.assert_array_equal(augmentation._integer(jnp.float32(1 - 2**-23), count), count - 1)
    draws = augmentation._integer(jax.random.uniform(jax.random.key(0), (7000,)), 7)
    assert stats.chisquare(np.bincount(draws, minlength=7)).pvalue > P_VALUE


# Erasing


def stub_random(uniforms, integers=None, random=0.0):
    """Replaces Python's `random` in timm: returns these values in turn, and then a corner."""
    uniforms, integers = iter(uniforms), iter(integers if integers is not None else [])
    return SimpleNamespace(
        random=lambda: random,
        uniform=lambda low, high: float(next(uniforms)),
        randint=lambda low, high: int(next(integers, low)),
    )


@pytest.mark.parametrize(("height", "width"), [(48, 20), (20, 48), (40, 3), (224, 224)])
def test_erased_sizes_equal_timms(height, width, monkeypatch):
    """Both get the same ten tries; in narrow images, possibly none of them fits."""
    import_timm()
    import timm.data.random_erasing as theirs
    import torch

    rng = np.random.default_rng(0)
    count = 1000 if height < 100 else 50
    area = rng.uniform(0.02, 1 / 3, (count, 10)).astype(np.float32)
    aspect = rng.uniform(math.log(0.3), -math.log(0.3), (count, 10)).astype(np.float32)
    ours = jax.jit(augmentation.erase_size, static_argnums=(2, 3))(area, aspect, height, width)
    erase = theirs.RandomErasing(probability=1, mode="const", device="cpu")
    expected = np.zeros((2, count), int)
    for i in range(count):
        tries = np.stack([area[i], aspect[i]], axis=1).ravel()
        monkeypatch.setattr(theirs, "random", stub_random(tries))
        erased = erase(torch.ones(1, height, width))[0].numpy() == 0
        expected[:, i] = erased.any(axis=1).sum(), erased.any(axis=0).sum()
    np.testing.assert_array_equal(np.stack(ours), expected)
    assert (expected == 0).any() == (width == 3)


def test_distribution_of_erasing():
    """Areas, aspects and places of 3,072 boxes are timm's; a fourth of the images is not erased."""
    import_timm()
    import random

    from timm.data.random_erasing import RandomErasing
    import torch

    batch, height, width = 4096, 40, 32
    erase = jax.jit(functools.partial(augmentation.random_erase, prob=0.75, mode="const"))
    erased = np.asarray(erase(jnp.ones((batch, height, width, 1)), jax.random.key(0)))[..., 0] == 0
    some = erased.any(axis=(1, 2))
    assert near(some.sum(), batch, 0.75)
    random.seed(0)
    peer = RandomErasing(probability=1, mode="const", device="cpu")
    theirs = bounds(peer(torch.ones(3072, 1, height, width))[:, 0].numpy() == 0)
    ours = bounds(erased[some])

    def size(boxes):
        return boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]

    for measure in (
        lambda b: np.prod(size(b), axis=0),
        lambda b: np.divide(*size(b)),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > P_VALUE


def test_what_is_put_in_the_box(monkeypatch):
    """The box has zeros, one colour or noise, as timm's with the same draws; the rest is kept."""
    import_timm()
    import timm.data.random_erasing as theirs
    import torch

    shape = (128, 24, 30, 3)
    images = np.random.default_rng(0).uniform(5, 6, shape).astype(np.float32)

    def erase(images, key):
        return {
            m: augmentation.random_erase(images, key, prob=0.5, mode=m)
            for m in augmentation.ERASE_MODES
        }

    erased = jax.device_get(jax.jit(erase)(images, jax.random.key(0)))
    inside = (erased["const"] == 0).all(axis=-1)
    some = inside.any(axis=(1, 2))
    assert 0 < some.sum() < 128
    boxes = bounds(inside[some])
    for mode, found in erased.items():
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[~inside], images[~inside], err_msg=mode)

    peer = theirs.RandomErasing(probability=1, mode="const", device="cpu")
    for found, image, (top, bottom, left, right) in zip(
        erased["const"][some], images[some], boxes, strict=True
    ):
        height, width = bottom - top, right - left
        draws = (height * width / (24 * 30), math.log(height / width))
        monkeypatch.setattr(theirs, "random", stub_random(draws, (top, left)))
        expected = peer(timm_images(image[None], torch))[0].numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(found, expected)

    assert stats.kstest(erased["pixel"][inside].ravel(), "norm").pvalue > P_VALUE
    corners = erased["rand"][some, boxes[:, 0], boxes[:, 2]]
    assert stats.kstest(corners.ravel(), "norm").pvalue > P_VALUE
    colours = np.broadcast_to(np.expand_dims(corners, (1, 2)), erased["rand"][some].shape)
    np.testing.assert_array_equal(erased["rand"][some][inside[some]], colours[inside[some]])


# The whole


def augment(**options):
    options = {**OPTIONS, **options}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return augmentation.BatchAugmentation(num_classes=10, mean=mean, std=std, **options)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (128, 18, 22, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, 128, dtype=np.int32)


def test_devices_change_nothing_and_send_nothing(batch):
    """Each device has sixteen images and a group has 24, so that groups span devices."""
    results, key = [], jax.random.key(3)
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        split, everywhere = sharding.over_batch(mesh), sharding.replicated(mesh)
        step = jax.jit(
            augment(group_size=24, prob=0.9),
            in_shardings=(split, split, everywhere),
            out_shardings=split,
        )
        step = step.lower(*batch, key).compile()
        hlo = step.as_text()
        sent = r" (?:all-|collective-|reduce-scatter|ragged-|send|recv|partition-id)[\w-]*\("
        assert set(re.findall(sent, hlo)) <= {" partition-id("}
        # No device computes the noise or the images of another.
        assert ("[128,18,22" in hlo) == (count == 1)
        results.append(jax.device_get(step(*jax.device_put(batch, split), key)))
    for one, eight in zip(*results, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, eight)
    np.testing.assert_allclose(results[0][1].sum(axis=1), 1, atol=1e-6)


def test_devices_with_less_than_a_unit_of_images(batch):
    """With four images each, partners are sent; results may differ by 1 ulp (see the module)."""
    images, labels, key = batch[0][:32], batch[1][:32], jax.random.key(1)
    results = []
    for count in (1, 8):
        split = sharding.over_batch(sharding.make_mesh(devices=jax.devices()[:count]))
        step = jax.jit(augment(group_size=8, erase_prob=0.0), out_shardings=split)
        results.append(jax.device_get(step(*jax.device_put((images, labels), split), key)))
    for one, eight in zip(*results, strict=True):
        np.testing.assert_allclose(one, eight, rtol=2e-7, atol=2e-7)


def test_images_are_erased_before_they_are_mixed(batch):
    """timm erases in the loader and mixes in the loop, so the noise of a box is mixed too."""
    key = jax.random.key(0)
    stages = [
        augment(mixup=0.0, cutmix=0.0, erase_prob=0.0),
        augment(mixup=0.0, cutmix=0.0, erase_prob=0.5),
        augment(cutmix=0.0, erase_prob=0.5),
    ]
    together = jax.jit(lambda *args: [stage(*args) for stage in stages])
    (whole, _), (erased, labels), (mixed, mixed_labels) = jax.device_get(together(*batch, key))
    touched = (np.abs(erased - whole) > 1e-3).any(axis=(1, 2, 3))  # more than 1 ulp of fusion
    assert near(touched.sum(), 128, 0.5)
    smooth = 0.9 * np.eye(10)[batch[1]] + 0.01
    np.testing.assert_allclose(labels, smooth, atol=1e-7)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(whole, (batch[0] / 255 - mean) / std, atol=1e-6)

    other = partners(128)
    differ = np.flatnonzero(batch[1] != batch[1][other])[0]
    own, theirs = batch[1][differ], batch[1][other][differ]
    # off = 0.01, on = 0.91: the label of a mixed image is 0.01 + 0.9 lambda
    lam = (mixed_labels[differ, own] - 0.01) / 0.9
    assert 0.02 < lam < 0.98
    np.testing.assert_allclose(mixed_labels[differ, theirs], 0.91 - 0.9 * lam, atol=1e-6)
    expected = lam * erased + (1 - lam) * erased[other]
    np.testing.assert_allclose(mixed, expected, atol=1e-5)  # lambda is only exact to some 1e-7
    np.testing.assert_allclose(mixed_labels, lam * labels + (1 - lam) * labels[other], atol=1e-6)


def test_options_are_checked():
    augment(smoothing=recipe.get_config().train.label_smoothing, **recipe.get_config().mixup)
    for name, value, message in [
        ("smoothing", 1.5, r"train\.label_smoothing: expected a number from 0 to 1, got 1\.5"),
        ("erase_prob", -0.1, r"mixup\.erase_prob: expected .* got -0\.1"),
        ("prob", float("nan"), r"mixup\.prob: expected .* got nan"),
        ("switch_prob", 2, r"mixup\.switch_prob: expected .* got 2"),
        ("mixup", -1.0, r"mixup\.mixup: expected 0 \(off\) or the alpha of a Beta, got -1\.0"),
        ("cutmix", float("inf"), r"mixup\.cutmix: expected .* got inf"),
        ("erase_mode", "noise", r"mixup\.erase_mode: expected one of .* got 'noise'"),
        ("group_size", 0, r"mixup\.group_size: expected 1 image or more, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            augment(**{name: value})
