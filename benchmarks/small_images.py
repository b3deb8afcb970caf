"""Times the making of training batches of small images, image by image and in whole chunks.

    python -m benchmarks.small_images --repetitions 15

The cases are scikit-learn's digits with the recipe of configs/digits.py, and images of 32 x 32
pixels with that of configs/cifar10.py (pad and crop, flip, RandAugment), as arrays in memory and as
PNG files, which is how tfds stores CIFAR. The images are cut from photos of scikit-image, so
nothing is downloaded. One process makes the batches, without worker processes.

"image by image" is how batches were made before 2026-11-26: a shuffled index, a generator and a
padded copy for every image, and PNG by Pillow. The speed of a machine drifts, so each repetition
times both, and ratios are taken within a repetition.
"""

import argparse
from collections.abc import Callable
import dataclasses
import io
import os
import time

import grain
import numpy as np
from PIL import Image

from configs import cifar10, digits
from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.images.transforms import TrainTransform
from convit_jax.data.open import open_source
from convit_jax.data.source import Example, Source

_IMAGES = 5_000  # number of photo cuts
_CHUNKS = 24  # chunks of 64 images in a measurement


def cuts(count: int = _IMAGES) -> ArraySource:
    """Returns images of 32 x 32 pixels, cut from shrunken photos of scikit-image."""
    import skimage.data

    names = ("astronaut", "chelsea", "coffee")
    shrunk = [Image.fromarray(getattr(skimage.data, name)()).resize((160, 160)) for name in names]
    photos = np.stack([np.asarray(photo) for photo in shrunk])
    rng = np.random.default_rng(0)
    places = zip(rng.integers(3, size=count), *rng.integers(0, 129, (2, count)), strict=True)
    images = np.stack([photos[i, y : y + 32, x : x + 32] for i, y, x in places])
    file_names = np.array([f"cut {i}".encode() for i in range(count)])
    return ArraySource(images, np.arange(count) % 10, tuple("0123456789"), file_names)


@dataclasses.dataclass(frozen=True)
class Files:
    """The images of another source as PNG files in memory."""

    arrays: ArraySource
    files: tuple[bytes, ...]
    description: str = "PNG files in memory"

    @classmethod
    def of(cls, arrays: ArraySource) -> "Files":
        files = []
        for image in arrays.images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            files.append(file.getvalue())
        return cls(arrays, tuple(files))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.arrays.class_names

    @property
    def num_classes(self) -> int:
        return self.arrays.num_classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return self.arrays[index] | {"image": self.files[index]}

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.arrays.names_and_labels(cache_dir)


def image_by_image(source: Source, transform: TrainTransform) -> Callable[[int], object]:
    """Returns a function that makes a chunk as it was made before, from its number."""
    padding = transform.pad_crop
    rest = dataclasses.replace(transform, crop="none", crop_pct=1.0)
    share = Share(64)

    def draw(number: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(number, len(source))
        index = grain.experimental.index_shuffle(
            place, max_index=len(source) - 1, seed=epoch, rounds=4
        )
        example, rng = source[index], np.random.default_rng((0, number))
        image = example["image"]
        if isinstance(image, bytes):
            image = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        height, width, _ = image.shape
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        y, x = rng.integers(0, 2 * padding + 1, size=2)
        return rest(padded[y : y + height, x : x + width], rng), example["label"]

    def chunk(number: int) -> object:
        images, labels = zip(*map(draw, share.positions(number)), strict=True)
        return np.stack(images), np.array(labels)

    return chunk


def cases() -> dict[str, tuple[Source, TrainTransform]]:
    """Returns {name of the case: (source, transform)}."""

    def transform(config, size: int) -> TrainTransform:
        options = config.augment.to_dict()
        return TrainTransform(size, crop_pct=options.pop("eval_crop"), **options)

    arrays = cuts()
    cifar = transform(cifar10.get_config(), 32)
    return {
        "digits": (open_source("digits", "train"), transform(digits.get_config(), 8)),
        "32 x 32, arrays": (arrays, cifar),
        "32 x 32, PNG": (Files.of(arrays), cifar),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15, help="measurements (default: 15)")
    args = parser.parse_args()
    print(f"microseconds an image, one of {os.cpu_count()} cores: median")
    print(f"{'':<18}{'image by image':>15}{'whole chunks':>14}{'ratio: median (quartiles)':>28}")
    for name, (source, transform) in cases().items():
        ways = (image_by_image(source, transform), TrainChunks(source, transform, Share(64), 0))
        times = np.zeros((args.repetitions + 1, 2))
        for repetition in range(len(times)):
            first = repetition * _CHUNKS
            for way, make in enumerate((ways[0], ways[1].__getitem__)):
                start = time.perf_counter()
                for number in range(first, first + _CHUNKS):
                    make(number)
                times[repetition, way] = (time.perf_counter() - start) / (_CHUNKS * 64)
        times = times[1:]  # the first repetition warms up
        before, now = np.median(times, axis=0) * 1e6
        low, median, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
        ratio = f"{median:.1f} ({low:.1f} to {high:.1f})"
        print(f"{name:<18}{before:>15.0f}{now:>14.1f}{ratio:>28}")


if __name__ == "__main__":
    main()
