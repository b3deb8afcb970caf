"""Random pictures in the number and size of ImageNet's, to time training without data."""

from collections.abc import Iterable
import functools
import io

import numpy as np

from convit_jax.data.source import Example, check_index, hashes

_NUMBERS = {"train": 1_281_167, "test": 50_000}
_CLASSES = 1000
_SIZE = (500, 375)  # width and height; a file has about 100 kB, one of ImageNet 110
_PICTURES = 64  # different ones; more would only take memory


class SyntheticSource:
    """JPEG files of random pictures. The labels have nothing to do with them.

    Attributes:
      class_names: "class-000" to "class-999".
      description: what the source reads, in one line.
    """

    def __init__(self, split: str):
        """Makes the source of a split, "train" or "test"."""
        self._split = split
        self.class_names = tuple(f"class-{label:03}" for label in range(_CLASSES))
        self.description = f"random pictures, {split}"

    @property
    def num_classes(self) -> int:
        return _CLASSES

    def __len__(self) -> int:
        return _NUMBERS[self._split]

    def __getitem__(self, index: int) -> Example:
        index = check_index(index, len(self))
        name = f"{self._split}-{index:07}"
        return {"image": _pictures()[index % _PICTURES], "label": index % _CLASSES, "name": name}

    def request(self, indices: Iterable[int]) -> None:
        """Does nothing, since the images are in memory."""

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(len(self))
        names = np.array([f"{self._split}-{number:07}".encode() for number in numbers])
        return names, np.arange(len(self), dtype=np.int32) % _CLASSES

    def fingerprints(self) -> np.ndarray:
        return hashes(self.names_and_labels()[0].tolist())


@functools.cache
def _pictures() -> list[bytes]:
    """Returns the JPEG files, the same in every process."""
    from PIL import Image

    rng, files = np.random.default_rng(0), []
    for _ in range(_PICTURES):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels: np.ndarray = np.asarray(shapes.resize(_SIZE, Image.Resampling.BICUBIC), np.float32)
        pixels = pixels + rng.normal(0, 15, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files
