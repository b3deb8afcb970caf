"""Finds the logit of each class of a data set, by the names of the classes."""

from collections.abc import Callable, Sequence
import dataclasses
import re

import numpy as np

from convit_jax.data.class_names import imagenet, readable
from convit_jax.data.first_names import first_names


@dataclasses.dataclass(frozen=True)
class ClassMapping:
    """The logit of each class of a data set.

    Attributes:
      logits: number of the logit of each class of the data; -1 leaves the class out.
      names: name to show for each class of the data.
      num_logits: number of logits of the weights.
      how: how the logits were found, in a few words.
    """

    logits: tuple[int, ...]
    names: tuple[str, ...]
    num_logits: int
    how: str

    @property
    def kept(self) -> tuple[int, ...]:
        """The classes of the data that are not left out."""
        return tuple(label for label, logit in enumerate(self.logits) if logit >= 0)

    @property
    def is_identity(self) -> bool:
        """Whether class i of the data is logit i, and there are no other logits."""
        return self.logits == tuple(range(self.num_logits))

    def restrict(self, labels: np.ndarray) -> "ClassMapping":
        """Leaves out the classes that are none of the labels, (n,) integers."""
        there = set(np.unique(labels).tolist())
        logits = tuple(x if label in there else -1 for label, x in enumerate(self.logits))
        return dataclasses.replace(self, logits=logits)


def match(
    data: Sequence[str],
    weights: Sequence[str] | None,
    num_logits: int,
    *,
    source: str,
    loaded: str,
    ordered: bool = False,
) -> ClassMapping:
    """Finds the logit of each class of a data set.

    Names are compared, also by ImageNet's WordNet ids and readable names. If they do not match all
    classes, they are compared without case, spaces, hyphens and underscores. Weights without names
    and with 1,000 logits are ImageNet's. Classes of ImageNet may also be the numbers 0 to 999. For
    other weights without names, classes named by numbers below `num_logits` mean these logits. Else
    class i of the data is taken for logit i, and `how` says so.

    Args:
      data: names of the classes of the data, in the order of the labels.
      weights: names of the classes of the weights, in the order of the logits; None if not known.
      num_logits: number of logits of the weights.
      source: what the data are, for messages.
      loaded: what the weights are, for messages.
      ordered: whether the user chose the order of the data's classes. If so, weights without names
        are matched by place and not by number.

    Raises:
      ValueError: if the data have a class that the weights lack, if two classes are one logit, or
        if the weights have no names and another number of classes.
    """
    known = weights
    if known is None and num_logits == len(imagenet()):
        known = tuple(imagenet())
    if known is not None:
        logits, how = _by_name(data, known, source, loaded)
        shown = readable(known, num_logits)
        names = tuple(shown[logit] for logit in logits)
    else:
        logits, how = _by_number_or_place(data, num_logits, source, loaded, ordered)
        names = tuple(imagenet().get(name, name) for name in data)
    taken: dict[int, str] = {}
    for name, logit in zip(data, logits, strict=True):
        if logit in taken:
            raise ValueError(
                f"data.source: expected classes that differ, got {taken[logit]!r} and {name!r} in "
                f"{source}, which are both class {logit} of {loaded}: merge or rename them"
            )
        taken[logit] = name
    return ClassMapping(tuple(logits), names, num_logits, how)


def are_same(data: Sequence[str], weights: Sequence[str] | None, num_logits: int) -> bool:
    """Returns whether class i of the data is logit i of the weights, as `match` finds them."""
    try:
        return match(data, weights, num_logits, source="", loaded="").is_identity
    except ValueError:
        return False


def _by_name(
    data: Sequence[str], known: Sequence[str], source: str, loaded: str
) -> tuple[list[int], str]:
    """Returns the logits of the data's classes, and how they were found."""
    exact = _unambiguous(known, str)
    other = imagenet() | {name: wnid for wnid, name in imagenet().items()}
    for name, logit in list(exact.items()):  # ImageNet's classes have two names
        if name in other:
            exact.setdefault(other[name], logit)
    if all(name in exact for name in data):
        return [exact[name] for name in data], "by name"
    keys = tuple(exact)
    loose = {key: exact[keys[place]] for key, place in _unambiguous(keys, _plain).items()}
    found = [exact.get(name, loose.get(_plain(name), -1)) for name in data]
    if min(found) >= 0:
        return found, "by name, whatever their case, spaces, hyphens and underscores"
    if tuple(known) == tuple(imagenet()) and _are_numbers(data, len(known)):
        return [int(name) for name in data], "by number, counted from 0 in ImageNet's order"
    unknown = [name for name, logit in zip(data, found, strict=True) if logit < 0]
    hint = ""
    if tuple(known) == tuple(imagenet()):
        hint = (
            ". Classes of ImageNet are named by WordNet ids, by the names of "
            "convit_jax/data/imagenet_classes.txt, or by numbers from 0: rename the folders"
        )
    raise ValueError(
        f"data.source: {len(unknown):,} of the {len(data):,} classes of {source} are not among the "
        f"{len(known):,} of {loaded}: {first_names(unknown, repr)}; those are "
        f"{first_names(known, repr)}{hint}"
    )


def _by_number_or_place(
    data: Sequence[str], num_logits: int, source: str, loaded: str, ordered: bool
) -> tuple[list[int], str]:
    """Returns the logits for weights whose classes have no names, and how they were found."""
    if _are_numbers(data, num_logits) and not ordered:
        return [int(name) for name in data], "by number, counted from 0"
    if len(data) != num_logits:
        raise ValueError(
            f"data.source: {source} has {len(data):,} classes, but {loaded} has {num_logits:,} "
            f"logits without names: expected as many classes, or class folders named by numbers "
            f"from 0 to {num_logits - 1:,} with data.class_order=sorted"
        )
    return list(range(num_logits)), (
        f"by place, since the weights do not name theirs: {first_names(data, repr)} are taken for "
        "0, 1, 2 ..., "
        + ("in the order of data.class_order" if ordered else "and data.class_order reorders them")
    )


def _are_numbers(names: Sequence[str], count: int) -> bool:
    """Returns whether all names are whole numbers from 0 to count - 1."""
    return all(name.isascii() and name.isdecimal() and int(name) < count for name in names)


def _unambiguous(names: Sequence[str], key: Callable[[str], str]) -> dict[str, int]:
    """Returns {key of the name: place of the name} of the keys that only one name has."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(key(name), []).append(place)
    return {key: found[0] for key, found in places.items() if len(found) == 1 and key}


def _plain(name: str) -> str:
    """Returns a name in lower case, with one space for hyphens, underscores and spaces."""
    return re.sub(r"[\s_-]+", " ", name.casefold()).strip()
