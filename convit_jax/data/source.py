"""The interface of an image source, and functions that work with any source.

A source is a random-access sequence of labelled images. It can be pickled, so that worker processes
can read from it, and it needs no TensorFlow. Images of files stay encoded: the workers decode them.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import hashlib
import operator
import time
from typing import Any, Protocol

import numpy as np

from convit_jax.data.corrupt import CorruptImageError, ImageError
from convit_jax.data.images.decode import decode

Example = dict[str, Any]


class Source(Protocol):
    """A random-access sequence of labelled images.

    An example is a dictionary: "image" is the bytes of an encoded image, or (h, w, c) uint8 if the
    source holds arrays; "label" is an int; "name" is the name of the image, for messages.

    Attributes:
      class_names: names of the classes, in the order of the labels.
      description: what the source reads and from where, in one line.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def description(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns an example; raises CorruptImageError if this one image cannot be read."""
        ...

    def request(self, indices: Iterable[int]) -> None:
        """Begins to read examples of a bucket, each of which will be asked for soon and once.

        Other sources do nothing, and compute none of the indices.
        """
        ...

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the names, (n,) bytes, and the labels, (n,) int32, of all images.

        If finding them takes long, they are stored in the folder `cache_dir`; None stores nothing.
        """
        ...

    def fingerprints(self) -> np.ndarray:
        """Returns a hash of each image: of its name or content, and of its class. (n,) uint64.

        A fingerprint does not depend on where the images are stored. That of a file does not depend
        on the other files either.
        """
        ...


def hashes(names: Iterable[bytes]) -> np.ndarray:
    """Returns a hash of each byte string: (n,) uint64, the same on every machine."""
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8")


def describe(source: Source) -> str:
    """Returns one line about a source: what it reads, its number of images and of classes."""
    return f"{source.description}: {len(source):,} images of {source.num_classes:,} classes"


def first_example(source: Source, skip_corrupt: bool) -> Example:
    """Returns the first example, or with `skip_corrupt` the first that can be read.

    Raises:
      CorruptImageError: if it cannot be read; with `skip_corrupt`, if none can be read.
    """
    for index in range(len(source) - 1 if skip_corrupt else 0):
        with contextlib.suppress(CorruptImageError):
            return source[index]
    return source[len(source) - 1 if skip_corrupt else 0]


def check_images(source: Source, count: int = 32) -> tuple[float, list[str]]:
    """Reads and decodes images that are spread evenly over a source.

    Args:
      source: the images.
      count: number of images to decode, at most all.

    Returns:
      The speed of one thread, in images per second, and a message about each corrupt image.

    Raises:
      ValueError: if an array in memory is not an image.
      ImageError: if a package is missing that reads an image.
    """
    start, damage = time.perf_counter(), []
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    source.request(indices.tolist())
    for index in indices:
        try:
            example = source[int(index)]
        except CorruptImageError as error:
            damage.append(str(error))
            continue
        image = example["image"]
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(
                    f"{example['name']}: expected (height, width, channels) uint8, got "
                    f"{image.shape} {image.dtype}"
                )
            continue
        try:
            decode(image)
        except CorruptImageError as error:
            damage.append(f"{example['name']}: {error}")
        except ImageError as error:
            raise ImageError(f"{example['name']}: {error}") from None
    return len(indices) / (time.perf_counter() - start), damage


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Subset:
    """Some of the images of a source, in the order of the source.

    Attributes:
      source: all images.
      indices: (n,) indices of the chosen images, rising.
      description: what is read and from where, in one line.
    """

    source: Source
    indices: np.ndarray
    description: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[check_index(index, len(self))])]

    def request(self, indices: Iterable[int]) -> None:
        self.source.request(int(self.indices[index]) for index in indices)

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        names, labels = self.source.names_and_labels(cache_dir)
        return names[self.indices], labels[self.indices]

    def fingerprints(self) -> np.ndarray:
        return self.source.fingerprints()[self.indices]


def check_index(index: int, size: int) -> int:
    """Returns the index as an int; raises IndexError unless 0 <= index < size."""
    index = operator.index(index)
    if not 0 <= index < size:
        raise IndexError(f"expected an index of 0 to {size - 1:,}, got {index:,}")
    return index


def subset(source: Source, ratio: float, cache_dir: str | None) -> Subset:
    """Returns the first int(n * ratio) images, by file name, of each class of n images.

    The original ConViT code chooses the same images.

    Args:
      source: the images.
      ratio: share of each class to keep, in (0, 1].
      cache_dir: folder that stores the names and labels; None stores nothing.

    Raises:
      ValueError: if no image of some class would be left.
    """
    names, labels = source.names_and_labels(cache_dir)
    order = np.lexsort((names, labels))
    counts = np.bincount(labels, minlength=source.num_classes)
    kept = [int(count * ratio) for count in counts]  # truncated, as in the original code
    for name, count, keep in zip(source.class_names, counts, kept, strict=True):
        if count and not keep:
            raise ValueError(
                f"data.sampling_ratio={ratio} leaves none of the {count} images of class "
                f"{name!r} of {source.description}; it must be at least {1 / count:.3g}"
            )
    starts = np.cumsum(counts) - counts
    chosen = [order[start : start + keep] for start, keep in zip(starts, kept, strict=True)]
    description = f"{source.description}, the first {ratio:.4g} of each class by file name"
    return Subset(source, np.sort(np.concatenate(chosen)), description)
