"""The identity of the data: which images a run is trained and evaluated on.

It is stored at every start of a run, and compared at the next start and among the processes of a
run. Paths are not part of it: the same images in another folder are the same data. Neither is the
content of files, which is not read.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
from typing import Any, Self

import numpy as np

from convit_jax.data.first_names import first_names
from convit_jax.data.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """What identifies the images of a split.

    Attributes:
      class_names: names of the classes, in the order of the labels.
      fingerprints: (n,) uint64, a hash of each image, in the order of the data.
      description: what the images are, in one line, for people.
    """

    class_names: tuple[str, ...]
    fingerprints: np.ndarray = dataclasses.field(repr=False)
    description: str = ""

    @classmethod
    def of(cls, source: Source) -> Self:
        """Returns the identity of a source."""
        return cls(tuple(source.class_names), source.fingerprints(), source.description)

    def summary(self) -> dict[str, Any]:
        """Returns JSON types: what the images are, their number, a hash of them, their classes.

        Two splits with the same "images" and "hash" have the same names and classes of images, in
        the same order.
        """
        return {
            "description": self.description,
            "images": len(self.fingerprints),
            "hash": hashlib.blake2b(self.fingerprints.tobytes(), digest_size=16).hexdigest(),
            "class_names": list(self.class_names),
        }


def class_difference(there: tuple[str, ...], here: tuple[str, ...]) -> str | None:
    """Describes how two lists of classes differ; returns None if they are the same.

    Args:
      there: the classes that are expected.
      here: the classes that were found.
    """
    if there == here:
        return None
    less = [name for name in there if name not in set(here)]
    more = [name for name in here if name not in set(there)]
    if less or more:
        parts = [f"{first_names(less, repr)} missing"] * bool(less)
        parts += [f"{first_names(more, repr)} new"] * bool(more)
        return f"{len(here):,} classes instead of {len(there):,}: {', '.join(parts)}"
    place = next(i for i in range(len(here)) if there[i] != here[i])
    return (
        f"the same {len(here):,} classes in another order: class {place} is {here[place]!r} "
        f"instead of {there[place]!r}"
    )


def image_difference(there: np.ndarray | None, here: np.ndarray) -> str:
    """Describes how two different sets of images differ, as the end of a sentence.

    Args:
      there: fingerprints of the images that are expected; None if they are not known.
      here: fingerprints of the images that were found.
    """
    if there is None:
        return ": which of them differ is not known"
    more, fewer = (len(np.setdiff1d(*pair)) for pair in ((here, there), (there, here)))
    return f": {more:,} more and {fewer:,} fewer" if more or fewer else ": in another order"


def process_differences(texts: list[str]) -> Iterator[str]:
    """Describes how the data of the processes of a run differ; yields nothing if they do not.

    Args:
      texts: for each process, the JSON text of {split: `Identity.summary()`}.
    """
    first = json.loads(texts[0])
    for process, text in enumerate(texts):
        for split, summary in json.loads(text).items():
            expected, who = first[split], f"{split}: process {process} has"
            classes = class_difference(
                tuple(expected["class_names"]), tuple(summary["class_names"])
            )
            if classes:
                yield f"{who} {classes}, compared with process 0"
            elif summary["images"] != expected["images"]:
                yield f"{who} {summary['images']:,} images, process 0 {expected['images']:,}"
            elif summary["hash"] != expected["hash"]:
                yield f"{who} other images than process 0, though equally many"
