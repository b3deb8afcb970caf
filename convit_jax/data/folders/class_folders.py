"""Class folders: image files labelled by the folder that they are in, or by a list beside them."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import logging
import os

import numpy as np

from convit_jax import storage
from convit_jax.data import class_names, corrupt, held_out, threads
from convit_jax.data.folders import class_order, label_lists, layouts
from convit_jax.data.folders.listing import EXTENSIONS, LeftOut, Tree, left_out_text, walk
from convit_jax.data.source import Example, check_index, hashes

log = logging.getLogger(__name__)

# Left out with data.held_out=spread, to keep the division of runs before format 3.
_NOT_SPREAD = (".jfif", ".gif", ".avif", ".heic", ".heif")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FolderSource:
    """Image files below a folder, labelled by the class folder that they are in.

    Attributes:
      root: the folder that holds the class folders.
      names: (n,) bytes, the paths of the files relative to `root`.
      labels: (n,) int32.
      class_names: names of the class folders, in the order of the labels.
      description: what the source reads, in one line.
      ahead: reads files in a bucket.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    description: str
    ahead: storage.ReadAhead = dataclasses.field(default_factory=storage.ReadAhead)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = check_index(index, len(self))
        path = self._path(index)
        if storage.is_bucket(path):
            image = corrupt.read_object(path, self.root, self.ahead)
        else:
            image = corrupt.read_file(path, self.root)
        return {"image": image, "label": int(self.labels[index]), "name": path}

    def request(self, indices: Iterable[int]) -> None:
        if storage.is_bucket(self.root):
            self.ahead.request(storage.Span(self._path(index)) for index in indices)

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.names, self.labels

    def fingerprints(self) -> np.ndarray:
        classes = [os.fsencode(name) for name in self.class_names]
        pairs = zip(self.names.tolist(), self.labels.tolist(), strict=True)
        return hashes(name + b"\0" + classes[label] for name, label in pairs)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a folder is read; the keys of the configuration with these names say more.

    Attributes:
      val_fraction: share held out for "test" if the folder is not divided. With 1 there is no
        training split, and "test" has all images.
      held_out: rule that chooses the images held out, "hash" or "spread".
      class_order: order of the classes: "sorted", "natural" or a file.
      train_split: name of the folder to train on; empty finds it.
      test_split: name of the folder to evaluate on; empty finds it.
    """

    val_fraction: float = 0.1
    held_out: str = "hash"
    class_order: str = "sorted"
    train_split: str = ""
    test_split: str = ""


def open_folder(path: str, split: str, options: Options) -> FolderSource:
    """Opens one split of a folder of images. docs/data.md lists the layouts.

    Args:
      path: a folder with train/ and val/, each with a folder of images for every class; or a folder
        that holds the class folders itself. It is on disk, or in a bucket.
      split: "train" or "test".
      options: how the folder is read.

    Raises:
      FileNotFoundError: if the folder or the split is missing.
      ValueError: if the layout is not understood, there are too few classes or images, or val/ has
        classes that train/ lacks.
    """
    root = _root(path)
    if not storage.is_folder(root):
        raise FileNotFoundError(
            f"data.source: no folder {root}; expected train/ and val/ in it, with a folder of "
            f"images for each class, or class folders"
        )
    earlier = options.held_out == "spread"  # a run of an earlier version keeps its images
    classes_known = earlier or class_order.is_file(options.class_order)
    layout = layouts.find_layout(
        root,
        options.train_split,
        options.test_split,
        classes_known=classes_known,
        earlier=earlier,
    )
    part = layout.train if split == "train" else layout.test
    if part is None:
        raise FileNotFoundError(layouts.missing_split(layout, split))
    in_training = options.val_fraction < 1  # 1 is an evaluation of weights, without a run
    notes = layout.test_notes if split == "test" and in_training else ()
    for note in (*layout.notes, *notes):
        _say(note)
    # The training classes define the labels, even if val/ lacks some of them.
    classes = _number_classes(layout.train or part, options.class_order)
    if part.labels != "folders":
        return _labelled_by_list(part, classes, layout.train is not None)
    there = {*part.top.folders}
    if unknown := sorted(there - {*classes}):
        raise ValueError(f"{part.top.path}: classes that train/ lacks: {unknown}")
    folders = [name for name in classes if name in there]
    beside = layout.left_out if layout.undivided else layout.left_out + part.top.left_out
    images = _list_classes(part, folders, beside, classes_known)
    if layout.undivided:
        return _divide(part.top.path, images, split, options)
    return _folder_source(part.top.path, images, classes, "")


def _root(path: str) -> str:
    """Returns the path of a folder, in full."""
    try:
        root = storage.as_path(path)
    except ValueError as error:
        raise ValueError(f"data.source: {error}") from None
    return os.fspath(root) if storage.is_bucket(path) else os.path.abspath(root)


def _number_classes(part: layouts.Part, order: str) -> tuple[str, ...]:
    """Returns the classes of the training images, or of the images to evaluate, in order."""
    path = part.top.path
    if part.labels == "imagenet":
        classes: Iterable[str] = class_names.imagenet()
    elif part.labels != "folders":
        classes = {*label_lists.annotated_labels(part.labels).values()}
    else:
        classes = part.top.folders
    in_order = class_order.in_order(classes, order, path)
    if len(in_order) < 2:
        count = len(part.top.images)
        beside = f" and {count:,} image{'s' * (count > 1)} in no class" if count else ""
        raise ValueError(
            f"{path}: expected at least two class folders, got {list(in_order)}{beside}; "
            f"data.source is 'folder:PATH' with the folder that holds train/ and val/, or the "
            f"class folders"
        )
    return in_order


def _labelled_by_list(part: layouts.Part, classes: Sequence[str], restrict: bool) -> FolderSource:
    """Opens images that a list labels, in one folder without class folders.

    Args:
      part: the images.
      classes: the classes, in order.
      restrict: whether to leave out ImageNet's classes that are not in `classes`.
    """
    path, left_out = part.top.path, LeftOut(part.top.left_out)
    if part.labels == "imagenet":
        labels = label_lists.imagenet_labels(part.top.images, path)
        listed_in = "ImageNet's list of validation labels"
        if restrict:
            labels, images, others = label_lists.restricted(labels, classes)
            if images:
                left_out[f"image(s) of the {others:,} classes that train/ lacks"] += images
    else:
        labels = label_lists.annotated_labels(part.labels)
        listed_in = part.labels
        if unknown := sorted({*labels.values()} - {*classes}):
            raise ValueError(f"{part.labels}: classes that train/ lacks: {unknown[:5]}")
        there = {*part.top.images}
        if unlabelled := there - {*labels}:
            left_out[f"image(s) without a line in {part.labels}"] += len(unlabelled)
        if missing := {*labels} - there:
            left_out[f"line(s) of {part.labels} without an image"] += len(missing)
        labels = {name: label for name, label in labels.items() if name in there}
    if not labels:
        raise ValueError(f"{path}: no image of the {len(classes):,} classes, by {listed_in}")
    _say_left_out(path, left_out)
    number = {name: i for i, name in enumerate(classes)}
    files = sorted(labels)
    return FolderSource(
        path,
        np.array([os.fsencode(file) for file in files]),
        np.array([number[labels[file]] for file in files], np.int32),
        tuple(classes),
        f"images in {path}, labelled by {listed_in}",
    )


def _list_classes(
    part: layouts.Part, folders: Sequence[str], left_out: LeftOut, classes_known: bool
) -> dict[str, list[str]]:
    """Lists the images of each class folder, at any depth, in ImageFolder's order.

    Args:
      part: the class folders.
      folders: their names, in order.
      left_out: what was left out above them, for the log.
      classes_known: whether they need not be checked to be classes, and not splits.
    """
    root = part.top.path
    paths = [os.path.join(root, name) for name in folders]
    walked = threads.in_threads("Listing", "classes", walk, paths)
    trees: dict[str, Tree] = dict(zip(folders, walked, strict=True))
    if not classes_known:
        layouts.check_level(root, trees)
    for name, tree in trees.items():
        if not tree.images:
            got = f"; it holds {left_out_text(tree.left_out)}" if tree.left_out else ""
            raise ValueError(
                f"{os.path.join(root, name)}: a class folder without images "
                f"({', '.join(EXTENSIONS)}){got}; remove it or fill it"
            )
    left_out = sum((tree.left_out for tree in trees.values()), LeftOut(left_out))
    if part.top.images:
        left_out["image(s) beside the class folders"] += len(part.top.images)
    _say_left_out(root, left_out)
    return {name: tree.images for name, tree in trees.items()}


def _divide(
    root: str, images: Mapping[str, list[str]], split: str, options: Options
) -> FolderSource:
    """Returns one split of class folders that are not divided."""
    fraction, rule = options.val_fraction, options.held_out
    held_out.check_fraction(fraction, split)
    chosen = {}
    for name, files in images.items():
        if rule == "hash":
            out = held_out.by_hash((os.fsencode(f"{name}/{file}") for file in files), fraction)
        else:
            files = [file for file in files if not file.lower().endswith(_NOT_SPREAD)]
            out = held_out.by_spread(len(files), fraction)
        wanted = out == (split == "test")
        chosen[name] = [file for file, keep in zip(files, wanted, strict=True) if keep]
        if split == "train" and not chosen[name]:
            raise ValueError(
                f"{os.path.join(root, name)}: {len(files)} images, of which "
                f"data.val_fraction={fraction} leaves none for training"
            )
    how = {"hash": "by the hash of CLASS/FILE", "spread": "spread over the file names"}[rule]
    share = f", about {fraction:.0%} of each class held out {how}, {split} part"
    share = ", all images" if fraction == 1 else share
    if not any(chosen.values()):
        raise ValueError(
            f"{root}: too few images for a {split} split{share}; "
            f"change data.val_fraction, or make train/ and val/"
        )
    return _folder_source(root, chosen, tuple(images), share)


def _folder_source(
    root: str, images: Mapping[str, list[str]], classes: tuple[str, ...], note: str
) -> FolderSource:
    number = {name: i for i, name in enumerate(classes)}
    files = np.array([os.fsencode(f"{name}/{file}") for name in images for file in images[name]])
    labels = [number[name] for name in images for _ in images[name]]
    description = f"class folders in {root}{note}"
    return FolderSource(root, files, np.array(labels, np.int32), classes, description)


def _say_left_out(path: str, left_out: LeftOut) -> None:
    if left_out:
        _say(f"{path}: left out: {left_out_text(left_out)}")


@functools.cache
def _say(text: str) -> None:
    """Logs a line once: both splits of a folder are opened, and say the same."""
    log.info("%s", text)
