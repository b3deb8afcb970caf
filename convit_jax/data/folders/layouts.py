"""Recognises the layout of a folder of images: which folder is which split, and where classes are.

Nothing is read but the names of files and folders. docs/data.md has a table of the layouts.
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import itertools
import os
import re

from convit_jax import storage
from convit_jax.data.first_names import first_names
from convit_jax.data.folders import label_lists, split_names
from convit_jax.data.folders.listing import LeftOut, Listing, Tree, scan

_NO_CLASS = frozenset({"image", "images", "img", "imgs"})  # folders of images without labels

_LIST_CLASSES = "--config.data.class_order=FILE, a file that lists all classes, one a line"
_EARLIER = ("val", "validation", "test")  # the folders that versions before format 3 knew
EXPECTED = "train/ and val/ with a folder of images for each class, or the class folders themselves"


@dataclasses.dataclass(frozen=True)
class Part:
    """The images of a split.

    Attributes:
      top: content of the folder of the images: class folders, or images that a list labels.
      labels: "folders" if the class folders label the images; "imagenet" for ImageNet's list of
        validation labels; else the path of a file val_annotations.txt.
    """

    top: Listing
    labels: str = "folders"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the splits of a folder are.

    Attributes:
      root: the folder that holds the splits or the class folders.
      train: the images to train on; None if there are none.
      test: the images to evaluate on; None if there are none.
      undivided: whether train and test are the same class folders, still to be divided.
      left_out: what lies beside the splits and is neither a folder nor an image.
      notes: what was decided, for the log.
      test_notes: what was decided about the images to evaluate on, for the log.
    """

    root: str
    train: Part | None
    test: Part | None
    undivided: bool
    left_out: LeftOut
    notes: tuple[str, ...] = ()
    test_notes: tuple[str, ...] = ()


def find_layout(
    path: str,
    train_split: str = "",
    test_split: str = "",
    *,
    classes_known: bool = False,
    earlier: bool = False,
) -> Layout:
    """Finds the splits of a folder.

    Args:
      path: the folder.
      train_split: name of the folder to train on; empty finds it.
      test_split: name of the folder to evaluate on; empty finds it.
      classes_known: whether folders with doubtful names are known to be classes.
      earlier: whether to evaluate the folder that versions before format 3 evaluated.

    Raises:
      FileNotFoundError: if there is no folder `train_split` or `test_split`.
      ValueError: if the layout is not understood; says what was found and what is expected.
    """
    top, left_out = _top(path, (train_split, test_split))
    notes = [f"{path}: reading {top.path}"] if top.path != path else []
    _check_names(top, train_split, test_split)
    below = {
        name: scan(os.path.join(top.path, name))
        for name in dict.fromkeys((*filter(split_names.role, top.folders), train_split, test_split))
        if name
    }
    train_name = train_split or _train_folder(top, below, test_split)
    if not train_name and not test_split and not _is_evaluation_only(top, below, classes_known):
        part = Part(top)
        return Layout(top.path, part, part, True, left_out, tuple(notes))
    train = Part(_class_root(below[train_name])) if train_name else None
    if train and train.top.path != below[train_name].path:
        notes.append(f"{below[train_name].path}: its class folders are in {train.top.path}")
    classes = set(train.top.folders) if train else None
    test_name, test, test_notes = _evaluation(below, train_name, test_split, classes, earlier)
    unread = [name for name in top.folders if name not in (train_name, test_name)]
    if test_name and unread:
        training = f"training reads {train_name}/, " if train_name else ""
        notes.append(
            f"{top.path}: {training}evaluation reads {test_name}/; not read: {_some(unread)}"
        )
    return Layout(top.path, train, test, False, left_out, tuple(notes), test_notes)


def _evaluation(
    below: Mapping[str, Listing],
    train_name: str,
    test_split: str,
    classes: set[str] | None,
    earlier: bool,
) -> tuple[str, Part | None, tuple[str, ...]]:
    """Finds the images to evaluate on.

    Args:
      below: the folders that may be splits.
      train_name: the one to train on; may be empty.
      test_split: the one to evaluate on; empty finds it, val/ first and test/ last.
      classes: the training classes; None if they are not known.
      earlier: whether to prefer the folders of `_EARLIER`.

    Returns:
      The name of the folder, its images, and notes for the log; "" and None if there are none.
    """
    names = [name for name in below if name != train_name and split_names.role(name) != "train"]
    names = [test_split] if test_split else sorted(names, key=split_names.place)
    parts = {name: part for name in names if (part := _labelled(below[name], classes))}
    if not parts:
        return "", None, ()
    known = [name for name in _EARLIER if name in parts and earlier]
    name = next(iter((*known, *parts)))
    if test_split or split_names.role(name) != "test":
        return name, parts[name], ()
    note = (
        f"{below[name].path} chooses the best checkpoint of a run, as there is no val/ with "
        f"labels: the accuracy on it is optimistic"
    )
    return name, parts[name], (note,)


def check_level(root: str, trees: Mapping[str, Tree]) -> None:
    """Raises ValueError if class folders look like splits, that is, are a level too high.

    Args:
      root: the folder of the class folders.
      trees: what each class folder holds.
    """
    # Folders of folders. One folder inside is not suspicious, unless the name is that of a split.
    nested = {
        name: set(tree.top.folders)
        for name, tree in trees.items()
        if tree.top.folders and not tree.top.images
        if len(tree.top.folders) > 1 or split_names.role_within(name)
    }
    roles = {name: split_names.role_within(name) for name in nested}
    for one, other in itertools.combinations(nested, 2):
        shared = nested[one] & nested[other]
        # Splits of the same classes may lack some of them.
        same = len(shared) > 1 and 2 * len(shared) >= min(len(nested[one]), len(nested[other]))
        if same or len({roles[one], roles[other]} - {""}) > 1:
            found = (
                f"{one}/ and {other}/ both hold {_some(sorted(shared))}"
                if same
                else f"{one}/ with {_some(sorted(nested[one]))} and {other}/ with "
                f"{_some(sorted(nested[other]))}, named as splits"
            )
            raise ValueError(
                f"{root}: expected {EXPECTED}; got {found}. {_name_the_splits(root, one, other)}"
            )


def _top(path: str, named: Collection[str]) -> tuple[Listing, LeftOut]:
    """Goes down while a folder holds one folder alone; returns also what was left out on the way.

    It stops at a split, and at a folder of `named`. It goes down to Data/CLS-LOC/ of Kaggle's
    ImageNet, whose other folders hold no images.
    """
    listing = scan(path)
    left_out = LeftOut(listing.left_out)
    while len(listing.folders) == 1 and not listing.images:
        only = listing.folders[0]
        if any(name and storage.is_folder(os.path.join(listing.path, name)) for name in named):
            break
        below = scan(os.path.join(listing.path, only))
        roles = {split_names.role(name) for name in below.folders} - {""}
        if not below.folders or (split_names.role(only) and len(roles) < 2):
            break
        listing = below
        left_out.update(listing.left_out)
    kaggle = os.path.join(listing.path, "Data", "CLS-LOC")
    if {"Annotations", "Data"} <= set(listing.folders) and storage.is_folder(kaggle):
        listing = scan(kaggle)
    return listing, left_out


def _check_names(top: Listing, train_split: str, test_split: str) -> None:
    for key, name in (("train_split", train_split), ("test_split", test_split)):
        path = os.path.join(top.path, name)
        if name and not storage.is_folder(path):
            raise FileNotFoundError(
                f"data.{key}: no folder {path}; expected one of {_some(top.folders)}"
            )
    if train_split and train_split == test_split:
        raise ValueError(
            f"data.test_split: expected another folder than data.train_split, got {test_split!r}"
        )


def _train_folder(top: Listing, below: Mapping[str, Listing], test_split: str) -> str:
    """Returns the name of the folder to train on; empty if there is none.

    A class may be called train, after the vehicle. The folder is a split if it holds two folders,
    or one while val/ or test/ hold folders or nothing beside it is a class.
    """
    plain = [name for name in top.folders if not split_names.role(name) and name != test_split]
    evaluation_has_classes = any(
        below[name].folders for name in below if split_names.role(name) != "train"
    )
    found = [
        name
        for name, listing in below.items()
        if split_names.role(name) == "train" and name != test_split
        if len(listing.folders) > 1 or (listing.folders and (evaluation_has_classes or not plain))
    ]
    if len(found) > 1:
        raise ValueError(
            f"{top.path}: expected one folder to train on, got {_some(found)}; choose with "
            f"--config.data.train_split={found[0]}"
        )
    return found[0] if found else ""


def _is_evaluation_only(top: Listing, below: Mapping[str, Listing], classes_known: bool) -> bool:
    """Returns whether a folder without a training split holds val/ or test/, not class folders.

    Raises:
      ValueError: if it cannot be told.
    """
    evaluation = [name for name in below if split_names.role(name) != "train"]
    plain = [name for name in top.folders if not split_names.role(name)]
    if not plain and any(_labelled(below[name], None) for name in evaluation):
        return True
    if classes_known:
        return False
    # A class may be called test, or valid beside invalid. A split has several folders, or none and
    # images of its own.
    splits = [
        name
        for name in evaluation
        if len(below[name].folders) > 1
        or not (below[name].folders or split_names.key(name) == "valid")
    ]
    if splits and plain:
        raise ValueError(
            f"{top.path}: expected {EXPECTED}; got {splits[0]}/ beside {_some(plain)}. If "
            f"{splits[0]}/ is a split, move it away or move the others into train/. If it is a "
            f"class: {_LIST_CLASSES}"
        )
    named = {
        name: role for name in top.folders if (role := split_names.role(re.sub(r"\d+", "", name)))
    }
    flat = [name for name in named if not scan(os.path.join(top.path, name)).folders]
    if len({named[name] for name in flat}) > 1:
        raise ValueError(
            f"{top.path}: expected {EXPECTED}; got {_some(flat)} without class folders in them, so "
            f"the images have no labels. Sort the images of each into a folder for each class"
        )
    return False


def _class_root(listing: Listing) -> Listing:
    """Goes down from the folder of a split while it holds one folder of several folders alone."""
    while len(listing.folders) == 1 and not listing.images:
        below = scan(os.path.join(listing.path, listing.folders[0]))
        if len(below.folders) < 2:
            break
        listing = below
    return listing


def _labelled(listing: Listing, classes: set[str] | None) -> Part | None:
    """Returns the labelled images in the folder of a split; None if they have no labels.

    Args:
      listing: the folder.
      classes: the training classes; None if they are not known.
    """
    folders, known = listing.folders, classes or set()
    annotations = os.path.join(listing.path, label_lists.ANNOTATIONS)
    annotated = folders in ((), ("images",)) and "images" not in known
    if annotated and storage.as_path(annotations).is_file():
        images = scan(os.path.join(listing.path, "images")) if folders else listing
        return Part(images, annotations)
    if not folders:
        return Part(listing, "imagenet") if label_lists.are_imagenet(listing.images) else None
    if len(folders) == 1 and folders[0] not in known:
        below = scan(os.path.join(listing.path, folders[0]))
        one_too_many = set(below.folders) <= known if known else len(below.folders) > 1
        if below.folders and one_too_many:
            return Part(below)
        if not below.folders and (
            folders[0].casefold() in _NO_CLASS or split_names.role(folders[0])
        ):
            return None
    return Part(listing)


def missing_split(layout: Layout, split: str) -> str:
    """Returns the text of the error that a layout has no images for a split."""
    there = scan(layout.root)
    found = f"{layout.root}: got {_some(there.folders) or 'no folder'}"
    if split == "train":
        return (
            f"{found}; expected train/ for the train split, with a folder of images for each class"
        )
    train = layout.train.top.path if layout.train else layout.root
    flat = [name for name in there.folders if split_names.role(name) in ("val", "test")]
    return (
        f"{found}; expected val/ or validation/ or test/ for the test split, with a folder of "
        f"images for each class{f', and {_some(flat)} has none' if flat else ''}. "
        f"--config.data.source=folder:{train} holds out data.val_fraction of each class"
    )


def _name_the_splits(root: str, one: str, other: str) -> str:
    train, test = (other, one) if split_names.role_within(other) == "train" else (one, other)
    return (
        f"If they are splits: --config.data.train_split={train} --config.data.test_split={test}. "
        f"If one of them holds the classes: "
        f"--config.data.source=folder:{os.path.join(root, train)}. "
        f"If they are classes: {_LIST_CLASSES}"
    )


def _some(names: Iterable[str]) -> str:
    """Returns the first five names of folders, and the number of others."""
    return first_names(f"{name}/" for name in names)
