"""What a source of images is, and what can be done with any of them.

Every source is a random-access sequence of examples, pickles into worker processes and reads
without TensorFlow. Images stay encoded: workers decode them.
"""

import dataclasses
import io
import operator
import time
from typing import Any, Protocol

import numpy as np
from PIL import Image

Example = dict[str, Any]


class Source(Protocol):
    """Labelled images.

    An example is {"image": encoded bytes, or (h, w, c) uint8 where the source has no files,
    "label": int, "name": the file's name, for messages}.
    """

    class_names: tuple[str, ...]
    description: str  # what is read where, in a line

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of all images, (n,) bytes and (n,) int32; kept in cache_dir where that is slow."""
        ...


def describe(source: Source) -> str:
    """What is read where, and how much of it there is, in a line."""
    return f"{source.description}: {len(source):,} images of {source.num_classes:,} classes"


def check_images(source: Source, count: int = 32) -> float:
    """Reads and decodes images spread evenly over the source.

    Returns:
      Images a second, of one thread.

    Raises:
      ValueError: if one of them cannot be decoded; it is named.
    """
    start = time.perf_counter()
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    for index in indices:
        example = source[int(index)]
        image = example["image"]
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(
                    f"{example['name']}: expected (height, width, channels) uint8, got "
                    f"{image.shape} {image.dtype}"
                )
            continue
        try:
            Image.open(io.BytesIO(image)).convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's
            raise ValueError(f"{example['name']}: not an image that decodes: {error}") from error
    return len(indices) / (time.perf_counter() - start)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Subset:
    """Some of the images of a source, in its order."""

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

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        names, labels = self.source.names_and_labels(cache_dir)
        return names[self.indices], labels[self.indices]


def check_index(index: int, size: int) -> int:
    """The index as an int, counted from the front."""
    index = operator.index(index)
    if not 0 <= index < size:
        raise IndexError(f"expected an index of 0 to {size - 1:,}, got {index:,}")
    return index


def subset(source: Source, ratio: float, cache_dir: str | None) -> Subset:
    """The first int(n * ratio) file names of each class of n images, as upstream takes them."""
    names, labels = source.names_and_labels(cache_dir)
    order = np.lexsort((names, labels))
    counts = np.bincount(labels, minlength=source.num_classes)
    kept = [int(count * ratio) for count in counts]  # the float product cut, as upstream does
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
