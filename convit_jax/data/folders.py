"""Class folders: image files labelled by the folder that they are in."""

from collections.abc import Mapping
import dataclasses
import os

import numpy as np

from convit_jax.data import corrupt, threads
from convit_jax.data.source import Example, check_index

HELD_OUT_FOLDERS = ("val", "validation", "test")  # the first that exists is the test split
# The extensions that torchvision's ImageFolder reads.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FolderSource:
    """Image files below a folder, labelled by the class folder that they are in.

    Attributes:
      root: the folder that holds the class folders.
      names: (n,) bytes, the paths of the files relative to `root`.
      labels: (n,) int32.
      class_names: names of the class folders, in the order of the labels.
      description: what the source reads, in one line.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    description: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = check_index(index, len(self))
        path = os.path.join(self.root, os.fsdecode(self.names[index]))
        image = corrupt.read_file(path, self.root)
        return {"image": image, "label": int(self.labels[index]), "name": path}

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.names, self.labels


def open_folder(path: str, split: str, val_fraction: float) -> FolderSource:
    """Opens one split of a folder of images.

    Args:
      path: a folder with train/ and val/ (or validation/, or test/), each with a folder of images
        for every class; or a folder that holds the class folders itself.
      split: "train" or "test".
      val_fraction: share of each class held out for "test" if `path` has no train/ and val/.

    Raises:
      FileNotFoundError: if the folder or the split is missing.
      ValueError: if there are too few classes or images, or val/ has classes that train/ lacks.
    """
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
    # The training classes define the labels, even if val/ lacks some of them.
    class_names = _class_names(root, "train" if "train" in there else folder)
    unknown = sorted({*_subfolders(root, folder)} - {*class_names})
    if unknown:
        raise ValueError(f"{os.path.join(root, folder)}: classes that train/ lacks: {unknown}")
    names = _list_classes(os.path.join(root, folder), _subfolders(root, folder))
    return _folder_source(os.path.join(root, folder), names, class_names, "")


def _open_undivided(root: str, split: str, val_fraction: float) -> FolderSource:
    """Opens one split of undivided class folders, by dividing the sorted files of each class."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction: expected 0 < fraction < 1, got {val_fraction}")
    class_names = _class_names(root, "")
    names = {}
    for name, files in _list_classes(root, class_names).items():
        # Hold out round(n * val_fraction) of n images, evenly spread over the sorted names.
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
    """Returns the folders in a folder, sorted; none if the folder does not exist."""
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
    """Lists the images of each class folder, at any depth, in ImageFolder's order."""
    paths = [os.path.join(root, name) for name in class_names]
    listed = threads.in_threads("Listing", "classes", _list_images, paths)
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
