"""Names of classes for people: ImageNet's, and those that weights or data sets carry."""

from collections.abc import Sequence
import functools
import pathlib

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet() -> dict[str, str]:
    """WordNet id -> name of ImageNet's 1,000 classes, in the order of the labels.

    The ids are those of tfds' imagenet2012, which are ILSVRC2012's in alphabetical order; the
    names are torchvision's, each of which is given once. (tests/make_class_names.py writes them.)
    """
    lines = _IMAGENET.read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def readable(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Names to show for the classes of a model.

    Args:
      names: what is known of them; None: 1,000 classes are taken for ImageNet's, and any other
        number for nameless ones, "class 0" and so on.
      num_classes: of the model.

    Raises:
      ValueError: if there are not as many names as classes.
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
