"""Readable names of classes: ImageNet's, and those stored with weights or data sets."""

from collections.abc import Sequence
import functools
import pathlib

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet() -> dict[str, str]:
    """Returns {WordNet id: name} of ImageNet's 1,000 classes, in the order of the labels.

    The ids are sorted alphabetically, as in tfds' imagenet2012. The names are
    torchvision's; no two are the same. tests/make_class_names.py writes the file.
    """
    lines = _IMAGENET.read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def readable(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names to show for the classes of a model.

    Args:
      names: names or WordNet ids in the order of the labels. If None, a model of 1,000 classes
        gets ImageNet's names, and any other model "class 0", "class 1" and so on.
      num_classes: number of classes of the model.

    Raises:
      ValueError: if the number of names is not the number of classes.
    """
    if names is None:
        if num_classes == len(imagenet()):
            return tuple(imagenet().values())
        return tuple(f"class {number}" for number in range(num_classes))
    if len(names) != num_classes:
        raise ValueError(
            f"class names: expected {num_classes}, as many as the model has classes, got "
            f"{len(names)}"
        )
    return tuple(imagenet().get(name, name) for name in names)
