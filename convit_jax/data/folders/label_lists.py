"""Labels of images that are in no class folders: ImageNet's validation images, val_annotations.txt.

`val/` of ImageNet holds 50,000 images directly; the list of their classes ships with tfds.
`val/` of tiny-imagenet-200 holds val_annotations.txt, with the name and the class of an image on
each line.
"""

from collections.abc import Mapping, Sequence
import os
import re

from convit_jax import storage
from convit_jax.data.imagenet import tar_files

ANNOTATIONS = "val_annotations.txt"
# ILSVRC2012_val_00000001.JPEG, in copies ILSVRC2012_val_00000001_n01751748.JPEG.
_IMAGENET = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?\.jpe?g", re.IGNORECASE)


def are_imagenet(images: Sequence[str]) -> bool:
    """Returns whether all of at least one image are named as ImageNet's validation images."""
    return bool(images) and all(_IMAGENET.fullmatch(name) for name in images)


def imagenet_labels(images: Sequence[str], where: str) -> dict[str, str]:
    """Returns {image: WordNet id} of ImageNet's validation images, by their numbers.

    Args:
      images: file names for which `are_imagenet` holds.
      where: the folder, for error messages.

    Raises:
      ValueError: if a number is not one of ImageNet's, or a name says another class than the list.
      ModuleNotFoundError: if tensorflow-datasets is not installed.
    """
    try:
        listed = tar_files.validation_wnids()
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{where}: the classes of ImageNet's validation images are in a list of "
            f"tensorflow-datasets: pip install tensorflow-datasets ({error})"
        ) from error
    labels = {}
    for name in images:
        match = _IMAGENET.fullmatch(name)
        assert match is not None
        number, said = int(match[1]), match[2]
        if not 1 <= number <= len(listed):
            raise ValueError(
                f"{os.path.join(where, name)}: expected a number of 1 to {len(listed):,}, as "
                f"ImageNet's validation images have"
            )
        labels[name] = listed[number - 1]
        if said and said.lower() != labels[name]:
            raise ValueError(
                f"{os.path.join(where, name)}: the name says class {said}, ImageNet's list of "
                f"validation labels {labels[name]}"
            )
    return labels


def annotated_labels(path: str) -> dict[str, str]:
    """Reads {image: class} from val_annotations.txt.

    Args:
      path: the file; every line begins with the name and the class of an image, with a tab between.

    Raises:
      ValueError: if a line has no class, or an image has two classes.
    """
    labels: dict[str, str] = {}
    text = storage.as_path(path).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest or not rest[0]:
            raise ValueError(f"{path}, line {number}: expected NAME<tab>CLASS, got {line!r}")
        if labels.setdefault(name, rest[0]) != rest[0]:
            raise ValueError(
                f"{path}, line {number}: {name} is of class {rest[0]!r}, above of {labels[name]!r}"
            )
    return labels


def restricted(
    labels: Mapping[str, str], classes: Sequence[str]
) -> tuple[dict[str, str], int, int]:
    """Keeps the images of some classes.

    Returns:
      {image: class} of these classes; the number of other images; the number of their classes.
    """
    known = set(classes)
    kept = {name: label for name, label in labels.items() if label in known}
    others = set(labels.values()) - known
    return kept, len(labels) - len(kept), len(others)
