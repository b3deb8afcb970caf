"""Chooses the images that are held out for evaluation where a data set has one split only."""

from collections.abc import Iterable
import math

import numpy as np

from convit_jax.data.source import hashes

RULES = ("hash", "spread")


def by_hash(names: Iterable[bytes], fraction: float) -> np.ndarray:
    """Holds out an image if the hash of its name is below a share of all hashes.

    So one image more or less moves no other image to the other part. The hash is BLAKE2b of 8
    bytes, read as a little-endian integer; an image is held out if hash / 2**64 < fraction.

    Args:
      names: a name of each image that does not change.
      fraction: share of the images to hold out, at most 1.

    Returns:
      (n,) bool, whether each image is held out.
    """
    # With - 1, a fraction of 1 fits 64 bits too.
    return hashes(names) <= np.uint64(math.ceil(fraction * 2**64) - 1)


def by_spread(count: int, fraction: float) -> np.ndarray:
    """Holds out round(count * fraction) images, evenly spread over the order of a class.

    Args:
      count: number of images of the class.
      fraction: share of the images to hold out.

    Returns:
      (count,) bool, whether each image is held out.
    """
    steps = np.floor(np.round(np.arange(count + 1) * fraction + 0.5, 9))
    return np.diff(steps) > 0


def check_fraction(fraction: float, split: str) -> None:
    """Raises ValueError unless the share to hold out is between 0 and 1.

    For the test split it may be 1: an evaluation without training reads all images.
    """
    if not 0 < fraction < 1 and not (fraction == 1 and split == "test"):
        raise ValueError(f"data.val_fraction: expected 0 < fraction < 1, got {fraction}")
