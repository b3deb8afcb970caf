"""Small images are transformed in whole chunks, with the same guarantees as image by image."""

import contextlib
import dataclasses
import io

import numpy as np
from PIL import Image
import pytest

from convit_jax.data.arrays import ArraySource, digits
from convit_jax.data.batches import gather
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.data.corrupt import CorruptImageError, ImageError
from convit_jax.data.images.pad_crop import pad_crop_flip
from convit_jax.data.images.random_numbers import Given, uniforms
from convit_jax.data.images.transforms import TrainTransform
from convit_jax.data.source import Subset

PLAIN = {"crop": "pad", "pad_crop": 2, "randaugment_ops": 0, "color_jitter": 0.0}
AUGMENTED = {
    "plain": PLAIN,
    "randaugment": {"crop": "pad", "pad_crop": 2},
    "exact": {"crop": "pad", "pad_crop": 1, "backend": "exact", "flip": 0.3},
    "jitter": {"crop": "pad", "pad_crop": 2, "randaugment_ops": 0},
}


def arrays(count: int = 100, channels: int = 3) -> ArraySource:
    images = np.random.default_rng(0).integers(256, size=(count, 8, 8, channels), dtype=np.uint8)
    names = np.array([f"image {i}".encode() for i in range(count)])
    return ArraySource(images, np.arange(count) % 10, tuple("0123456789"), names)


class Files:
    """The images of another source as PNG files, some of them damaged."""

    description = "files"

    def __init__(self, source, damaged=()):
        self.source = source
        self.damaged = damaged

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        file = io.BytesIO()
        Image.fromarray(example["image"]).save(file, "PNG")
        data = file.getvalue()
        return example | {"image": data[:-60] if index in self.damaged else data}


def chunks(source=None, size=8, share=None, seed=0, options=PLAIN, **more):
    share = Share(20) if share is None else share
    return TrainChunks(source or arrays(), TrainTransform(size, **options), share, seed, **more)


def joined(parts, key="image"):
    return np.concatenate([part[key] for part in parts])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTED)
def test_a_chunk_is_what_single_calls_make(name, channels):
    transform = TrainTransform(8, **AUGMENTED[name])
    images, numbers = arrays(64, channels).images, uniforms(0, range(64), transform.numbers)
    before = images.copy()
    actual = transform.of_chunk(images, numbers)
    np.testing.assert_array_equal(images, before)
    for image, row, out in zip(images, numbers.tolist(), actual, strict=True):
        given = Given(row)
        np.testing.assert_array_equal(transform(image, given), out)
    assert (actual != images).mean() > 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_cropping_and_flipping(channels):
    images = arrays(500, channels).images
    numbers = uniforms(1, range(500), 3)
    for image, (y, x, flip), out in zip(
        images, numbers, pad_crop_flip(images, numbers, 3, 0.3), strict=True
    ):
        top, left = int(y * 7), int(x * 7)
        expected = np.pad(image, ((3, 3), (3, 3), (0, 0)))[top : top + 8, left : left + 8]
        np.testing.assert_array_equal(out, expected[:, ::-1] if flip < 0.3 else expected)
    np.testing.assert_array_equal(pad_crop_flip(images, numbers, 0, 0.0), images)


@pytest.mark.parametrize("options", AUGMENTED.values(), ids=AUGMENTED)
def test_arrays_and_files_and_any_cut_into_chunks_give_the_same_images(options):
    """The stream is 3 epochs; it is read at once, in pieces, by two processes, and from files."""
    whole = [chunks(options=options)[i] for i in range(15)]
    images, labels = joined(whole), joined(whole, "label")
    for size in (4, 50):
        cut = [chunks(options=options, share=Share(size))[i] for i in range(300 // size)]
        np.testing.assert_array_equal(joined(cut), images)
        np.testing.assert_array_equal(joined(cut, "label"), labels)
    for index in (0, 1):
        mine = chunks(options=options, share=Share(20, index, 2))[7]
        np.testing.assert_array_equal(mine["image"], whole[7]["image"][index * 10 :][:10])
    files = [chunks(Files(arrays()), options=options)[i] for i in range(15)]
    np.testing.assert_array_equal(joined(files), images)
    np.testing.assert_array_equal(joined(files, "label"), labels)
    with contextlib.closing(iterate(chunks(options=options), 9, 11)) as late:
        np.testing.assert_array_equal(joined(list(late)), joined(whole[9:11]))
    assert (joined([chunks(options=options, seed=1)[0]]) != whole[0]["image"]).mean() > 0.5


def test_repeats_and_subsets_are_gathered_as_they_are_read():
    part = Subset(arrays(), np.arange(10, 90, 2), "a part")
    for repeats in (1, 3):
        at_once = [chunks(part, repeats=repeats)[i] for i in range(6)]
        read = [chunks(Files(part), repeats=repeats)[i] for i in range(6)]
        for key in ("image", "label", "skipped"):
            np.testing.assert_array_equal(joined(at_once, key), joined(read, key))


def test_a_corrupt_file_is_replaced_and_changes_no_other_image():
    gather.say_once.cache_clear()
    damaged = {3, 50, 51}
    whole = [chunks()[i] for i in range(5)]
    with pytest.raises(CorruptImageError, match=r"image \d+: not a readable image"):
        joined([chunks(Files(arrays(), damaged))[i] for i in range(5)])
    lenient = [chunks(Files(arrays(), damaged), skip_corrupt=True)[i] for i in range(5)]
    replaced = joined(lenient, "skipped") > 0
    assert replaced.sum() == len(damaged)
    same = (joined(lenient) == joined(whole)).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, ~replaced)


@pytest.mark.parametrize("source", [arrays(channels=1), Files(arrays())], ids=["arrays", "files"])
def test_images_that_do_not_fit_are_named(source):
    with pytest.raises(ImageError, match=r"image \d+: crop 'pad': expected images of \(9, 9\)"):
        chunks(source, size=9)[0]


def test_the_batches_of_digits_do_not_change_from_version_to_version():
    options = dataclasses.asdict(TrainTransform(8, **PLAIN | {"pad_crop": 1, "flip": 0.0}))
    options.pop("size")
    batch = chunks(digits("train"), share=Share(128), options=options)[11]
    assert batch["label"][:16].tolist() == [8, 0, 0, 9, 4, 8, 3, 1, 6, 5, 8, 6, 4, 7, 9, 6]
    assert batch["image"].astype(int).sum(axis=(1, 2, 3))[:6].tolist() == [
        4560,
        4750,
        3700,
        3730,
        4895,
        4512,
    ]
