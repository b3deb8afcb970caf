"""The order of the batches: it depends on the seed, not on workers, processes or restarts."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest

from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches.chunks import EvalChunks, Share, TrainChunks, draws_per_epoch
from convit_jax.data.batches.workers import iterate
from convit_jax.data.corrupt import CorruptImageError, ImageError
from convit_jax.data.images.transforms import TrainTransform

NUM = 600


def numbered(num: int = NUM) -> ArraySource:
    """Images that contain their number: 2 x 2 pixels, the number's two bytes twice."""
    number = np.arange(num)
    images = np.stack([number % 256, number // 256] * 2, axis=-1).astype(np.uint8)
    labels = (number % 10).astype(np.int32)
    names = np.array([f"image {i}".encode() for i in number])
    return ArraySource(images.reshape(num, 2, 2, 1), labels, tuple("0123456789"), names)


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keeps the number in the upper row and writes a random draw into the lower."""
    image = image.copy()
    image[1] = rng.integers(0, 256, size=(2, 1))
    return image


def chunks(batch_size=32, index=0, count=1, seed=0, repeats=1, source=None, **options):
    share = Share(batch_size, index, count)
    source = numbered() if source is None else source
    return TrainChunks(source, add_noise, share, seed=seed, repeats=repeats, **options)


def batches(number, start=0, workers=0, **options):
    iterator = iterate(chunks(**options), start, start + number, workers)
    with contextlib.closing(iterator):
        return list(iterator)


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "skipped"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def numbers(seen) -> np.ndarray:
    images = np.concatenate([batch["image"] for batch in seen]).astype(int)
    return images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0]


def test_every_epoch_has_every_image_once_in_a_new_order():
    seen = numbers(batches(3 * NUM // 30, batch_size=30)).reshape(3, NUM)
    for epoch in seen:
        assert sorted(epoch) == list(range(NUM))
    assert not np.array_equal(seen[0], seen[1])
    assert abs(np.corrcoef(seen[0], np.arange(NUM))[0, 1]) < 0.1  # shuffled, not sorted
    assert abs(np.corrcoef(seen[0], seen[1])[0, 1]) < 0.1


def test_repeated_augmentation():
    """An image is drawn three times in a row, each augmented anew; epochs are cut as in DeiT."""
    assert draws_per_epoch(1_281_167, 3) == 1_281_024
    assert draws_per_epoch(1_281_167, 1) == 1_281_167
    assert draws_per_epoch(100, 3) == 100
    epoch = draws_per_epoch(NUM, 3)
    assert epoch == 512
    seen = batches(2 * epoch // 32, repeats=3)
    drawn = numbers(seen)
    first, second = drawn[:epoch], drawn[epoch:]
    np.testing.assert_array_equal(first[:510:3], first[1:510:3])
    np.testing.assert_array_equal(first[:510:3], first[2:510:3])
    assert len(set(first)) == 171
    assert len(set(second)) == 171
    assert set(first) != set(second)
    noise = np.concatenate([batch["image"] for batch in seen])[:, 1]
    assert np.mean(np.all(noise[:510:3] == noise[1:510:3], axis=(1, 2))) < 0.05
    once = numbers(batches(epoch // 32, repeats=1))
    np.testing.assert_array_equal(once[:170], first[:510:3])  # both have the same shuffle


def test_draws_depend_on_the_seed_alone():
    assert_equal(batches(3), batches(3))
    one, other = batches(3), batches(3, seed=1)
    assert (numbers(one) != numbers(other)).mean() > 0.9


def test_a_run_started_late_sees_what_it_would_have_seen():
    assert_equal(batches(45)[41:], batches(4, start=41))  # beyond the second epoch


@pytest.mark.parametrize("number", [1, 3])
def test_workers_make_the_same_batches(number):
    options = {"batch_size": 192, "repeats": 3}  # three chunks a batch
    assert chunks(**options).share.chunks == 3
    assert_equal(batches(4, start=2, **options), batches(4, start=2, workers=number, **options))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count):
    shares = [batches(3, index=i, count=count) for i in range(count)]
    for step, batch in enumerate(batches(3)):
        for key in ("image", "label"):
            joined = np.concatenate([share[step][key] for share in shares])
            np.testing.assert_array_equal(joined, batch[key])
    with pytest.raises(ValueError, match="multiple of the 5 processes, got 32"):
        Share(32, 0, 5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_image_once(count):
    seen = []
    for index in range(count):
        share = Share(128, index, count)
        with contextlib.closing(
            iterate(EvalChunks(numbered(), lambda image: image, share))
        ) as iterator:
            seen.append(list(iterator))
    assert {len(part) for part in seen} == {5}  # every process has as many batches, so none waits
    kept = [
        number
        for part in seen
        for batch in part
        for number, mask in zip(numbers([batch]), batch["mask"], strict=True)
        if mask
    ]
    assert sorted(kept) == list(range(NUM))
    assert {batch["image"].shape for part in seen for batch in part} == {(128 // count, 2, 2, 1)}


class Fragile:
    """A transform that fails on some images, as a decoder does."""

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, image, rng=None):
        if int(image[0, 0, 0]) + 256 * int(image[0, 1, 0]) in self.bad:
            raise CorruptImageError("not a JPEG")
        return image


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_named_or_replaced_and_counted(workers):
    bad = set(range(0, NUM, 7))
    share = Share(30)
    strict = TrainChunks(numbered(), Fragile(bad), share, seed=0)
    message = r"image \d+: not a JPEG\. .*data\.skip_corrupt=True"
    iterator = iterate(strict, workers=workers)
    with contextlib.closing(iterator), pytest.raises(CorruptImageError, match=message):
        list(itertools.islice(iterator, 20))
    skipping = TrainChunks(numbered(), Fragile(bad), share, seed=0, skip_corrupt=True)
    with contextlib.closing(iterate(skipping, workers=workers)) as iterator:
        seen = [next(iterator) for _ in range(20)]
    drawn = numbers(seen)
    assert not bad.intersection(drawn)
    assert sum(int(batch["skipped"].sum()) for batch in seen) >= len(bad)
    plain = TrainChunks(numbered(), Fragile(()), share, seed=0)
    with contextlib.closing(iterate(plain)) as iterator:
        undisturbed = numbers([next(iterator) for _ in range(20)])
    changed = drawn != undisturbed
    np.testing.assert_array_equal(changed, np.isin(undisturbed, list(bad)))


def test_images_of_different_sizes_make_no_batch():
    def crop(image, rng):
        return image[: rng.integers(1, 3)]

    with pytest.raises(ValueError, match=r"expected all \(\d, 2, 1\), got \(\d, 2, 1\)"):
        TrainChunks(numbered(), crop, Share(30), seed=0)[0]


def test_too_many_corrupt_images_are_an_error():
    everything = TrainChunks(
        numbered(300), Fragile(range(300)), Share(10), seed=0, skip_corrupt=True
    )
    with pytest.raises(CorruptImageError, match=r"100 images in a row are corrupt.*not a JPEG$"):
        everything[0]
    nothing = EvalChunks(numbered(300), Fragile(range(300)), Share(10), skip_corrupt=True)
    with pytest.raises(CorruptImageError, match=r"the first 100 images are all corrupt: arrays in"):
        nothing[0]


def test_skipped_images_are_logged_by_name_once(caplog):
    skipping = TrainChunks(numbered(), Fragile({450}), Share(60), seed=0, skip_corrupt=True)
    for chunk in range(3 * NUM // 60):
        skipping[chunk]
    assert [record.message for record in caplog.records] == [
        "corrupt, so it is skipped: image 450: not a JPEG"
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_leaves_corrupt_images_out(count):
    bad = {0, 5, *range(64, 128), NUM - 1}  # among them a whole chunk
    for index in range(count):
        strict = EvalChunks(numbered(), Fragile(bad), Share(128, index, count))
        lenient = dataclasses.replace(strict, skip_corrupt=True)
        whole = dataclasses.replace(strict, transform=Fragile(()))
        for chunk in range(len(strict)):
            expected, batch = whole[chunk], lenient[chunk]
            corrupt = np.isin(numbers([expected]), list(bad)) & (expected["mask"] == 1)
            if corrupt.any():
                with pytest.raises(CorruptImageError, match=r"image \d+: not a JPEG.*skip_corrupt"):
                    strict[chunk]
            np.testing.assert_array_equal(batch["mask"], np.where(corrupt, -1, expected["mask"]))
            kept = batch["mask"] == 1
            np.testing.assert_array_equal(batch["label"][kept], expected["label"][kept])
            np.testing.assert_array_equal(batch["image"][kept], expected["image"][kept])
            assert np.all(batch["label"][corrupt] == -1)
            assert not batch["image"][corrupt].any()


def test_a_mistake_in_the_configuration_is_never_skipped():
    """Images of another size."""
    transform = TrainTransform(4, crop="pad", pad_crop=1)
    mistaken = TrainChunks(numbered(), transform, Share(30), seed=0, skip_corrupt=True)
    with pytest.raises(ImageError, match=r"image \d+: .*crop 'pad': expected images of") as caught:
        mistaken[0]
    assert not isinstance(caught.value, CorruptImageError)
