"""Where images come from: prepared tfds data sets, class folders, scikit-learn's digits.

Every source is a random-access sequence of examples, pickles into worker processes and reads
without TensorFlow. Images stay encoded: decoding is the workers' part.
"""

from collections.abc import Mapping
import dataclasses
import io
import os
import pathlib
import time
from typing import Any, Protocol

import numpy as np
from PIL import Image

from convit_jax import records, tfds_source

Example = dict[str, Any]

SPLITS = ("train", "test")
HELD_OUT_FOLDERS = ("val", "validation", "test")  # the first there is
# torchvision's ImageFolder takes the same ones.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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


def open_source(
    source: str,
    split: str,
    *,
    data_dir: str = "",
    sampling_ratio: float = 1.0,
    cache_dir: str | None = None,
    val_fraction: float = 0.1,
) -> Source:
    """Opens a data set.

    Args:
      source: "tfds:NAME", "tfds:NAME:VERSION" or "tfds:NAME/CONFIG" for a prepared tfds set,
        "folder:PATH" for class folders below train/ and val/ (or validation/, or test/) of
        PATH or, where there are none of these, in PATH itself; "digits" for scikit-learn's.
      split: "train", or "test" for the images held out: of a tfds set its validation split or,
        if it has none, its test split.
      data_dir: where the tfds sets are; if empty, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      sampling_ratio: share of the training images of each class, the first by file name; the
        test split is always whole.
      cache_dir: where to keep indices of large sets; None keeps none.
      val_fraction: share of each class that a folder without val/ holds out.

    Raises:
      ValueError, FileNotFoundError: if the data are not there or not what they should be.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not 0 < sampling_ratio <= 1:
        raise ValueError(f"data.sampling_ratio: expected 0 < ratio <= 1, got {sampling_ratio}")
    kind, _, rest = source.partition(":")
    if source == "digits":
        opened = _digits(split)
    elif kind == "folder" and rest:
        opened = _open_folder(rest, split, val_fraction)
    elif kind == "tfds" and rest:
        opened = tfds_source.open_tfds(rest, split, data_dir, cache_dir)
    else:
        raise ValueError(
            f"data.source: expected 'digits', 'folder:PATH' or 'tfds:NAME', got {source!r}"
        )
    if split == "train" and sampling_ratio < 1:
        opened = _subset(opened, sampling_ratio, cache_dir)
    return opened


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
class ArraySource:
    """Images in memory: (n, height, width, channels) uint8, labels (n,)."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    names: np.ndarray  # (n,) bytes
    description: str = "arrays in memory"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = records.check_index(index, len(self))
        name, label = self.names[index].decode(), int(self.labels[index])
        return {"image": self.images[index], "label": label, "name": name}

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.names, self.labels


def _digits(split: str) -> ArraySource:
    """scikit-learn's digits, a fifth of every class held out for the test: 1,437 and 360 images."""
    from sklearn import datasets, model_selection  # a second to import

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # 0 to 16 there
    labels = digits.target.astype(np.int32)
    parts = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    index = np.sort(parts[SPLITS.index(split)])
    names = np.array([f"digit-{i:04}".encode() for i in index])
    class_names = tuple(map(str, range(10)))
    return ArraySource(
        images[index], labels[index], class_names, names, f"scikit-learn's digits, {split}"
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FolderSource:
    """Image files below `root`, labelled by the folder of their class."""

    root: str
    names: np.ndarray  # (n,) bytes, relative to the root
    labels: np.ndarray  # (n,) int32
    class_names: tuple[str, ...]
    description: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = records.check_index(index, len(self))
        path = os.path.join(self.root, os.fsdecode(self.names[index]))
        image = pathlib.Path(path).read_bytes()
        return {"image": image, "label": int(self.labels[index]), "name": path}

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.names, self.labels


def _open_folder(path: str, split: str, val_fraction: float) -> FolderSource:
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data.source: no folder {root}; expected train/ and val/ in it, with a folder of "
            f"images for each class, or class folders"
        )
    there = [name for name in ("train", *HELD_OUT_FOLDERS) if _subfolders(root, name)]
    if not there:
        return _open_undivided(root, split, val_fraction)
    wanted = ("train",) if split == "train" else HELD_OUT_FOLDERS
    folder = next((name for name in wanted if name in there), None)
    if folder is None:
        raise FileNotFoundError(
            f"{root}: expected {' or '.join(f'{name}/' for name in wanted)} for the {split} "
            f"split, got {', '.join(f'{name}/' for name in there)} alone"
        )
    # The training classes number the labels, also where val/ lacks some of them.
    class_names = _class_names(root, "train" if "train" in there else folder)
    unknown = sorted({*_subfolders(root, folder)} - {*class_names})
    if unknown:
        raise ValueError(f"{os.path.join(root, folder)}: classes that train/ lacks: {unknown}")
    names = _list_classes(os.path.join(root, folder), _subfolders(root, folder))
    return _folder_source(os.path.join(root, folder), names, class_names, "")


def _open_undivided(root: str, split: str, val_fraction: float) -> FolderSource:
    """Class folders, of which the images of each class are divided by file name."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction: expected 0 < fraction < 1, got {val_fraction}")
    class_names = _class_names(root, "")
    names = {}
    for name, files in _list_classes(root, class_names).items():
        # Round(n f) of n images, evenly spread over the sorted names.
        steps = np.floor(np.round(np.arange(len(files) + 1) * val_fraction + 0.5, 9))
        held_out = np.diff(steps) > 0
        names[name] = list(np.array(files)[held_out == (split == "test")])
        if split == "train" and not names[name]:
            raise ValueError(
                f"{os.path.join(root, name)}: {len(files)} images, of which "
                f"data.val_fraction={val_fraction} leaves none for training"
            )
    share = f", {val_fraction:.0%} of each class held out, {split} part"
    if not any(names.values()):
        raise ValueError(f"{root}: too few images for a {split} split{share}; make a val/ folder")
    return _folder_source(root, names, class_names, share)


def _folder_source(
    root: str, names: Mapping[str, list[str]], class_names: tuple[str, ...], note: str
) -> FolderSource:
    number = {name: i for i, name in enumerate(class_names)}
    files = np.array([os.fsencode(f"{name}/{file}") for name in names for file in names[name]])
    labels = [number[name] for name in names for _ in names[name]]
    description = f"class folders in {root}{note}"
    return FolderSource(root, files, np.array(labels, np.int32), class_names, description)


def _subfolders(root: str, name: str) -> list[str]:
    """Folders in a folder, sorted; none if it does not exist."""
    path = os.path.join(root, name)
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _class_names(root: str, name: str) -> tuple[str, ...]:
    class_names = tuple(_subfolders(root, name))
    if len(class_names) < 2:
        raise ValueError(
            f"{os.path.join(root, name)}: expected at least two class folders, got "
            f"{list(class_names)}; data.source is 'folder:PATH' with the folder that holds "
            f"train/ and val/, or the class folders"
        )
    return class_names


def _list_classes(root: str, class_names: tuple[str, ...] | list[str]) -> dict[str, list[str]]:
    """Images of each class folder, at any depth, in ImageFolder's order."""
    paths = [os.path.join(root, name) for name in class_names]
    listed = records.in_threads("Listing", "classes", _list_images, paths)
    return dict(zip(class_names, listed, strict=True))


def _list_images(path: str) -> list[str]:
    images = []
    for folder, _, files in sorted(os.walk(path, followlinks=True)):
        inside = os.path.relpath(folder, path)
        kept = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        images += kept if inside == "." else [os.path.join(inside, file) for file in kept]
    if not images:
        raise ValueError(
            f"{path}: a class folder without images ({', '.join(EXTENSIONS)}); remove it or fill it"
        )
    return images


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
        return self.source[int(self.indices[records.check_index(index, len(self))])]

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        names, labels = self.source.names_and_labels(cache_dir)
        return names[self.indices], labels[self.indices]


def _subset(source: Source, ratio: float, cache_dir: str | None) -> Subset:
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
