"""Random numbers of many draws at once, each a function of the seed and the draw alone.

A generator for every image would take longer than the transform of a small image. NumPy's Philox
(Salmon et al. 2011) is a function of a counter, so the numbers of consecutive draws come from
consecutive counters, in one call.
"""

from collections.abc import Iterable
import math
from typing import Protocol

import numpy as np

_STREAM = 1  # other streams of the same seed are free for other uses
_PER_COUNTER = 4  # 64-bit numbers that Philox makes of one counter


def uniforms(seed: int, draws: range, width: int) -> np.ndarray:
    """Returns (len(draws), width) numbers in [0, 1), with 53 random bits each.

    Row i is a function of `seed`, `draws[i]` and `width`, whatever the other draws are.

    Args:
      seed: any integer.
      draws: consecutive draws, each from 0.
      width: number of numbers for each draw.
    """
    counters = math.ceil(width / _PER_COUNTER)
    key = (_STREAM << 64) | (seed % 2**64)
    philox = np.random.Philox(key=key, counter=draws.start * counters)
    bits = philox.random_raw(len(draws) * counters * _PER_COUNTER)
    return ((bits >> 11) * 2.0**-53).reshape(len(draws), -1)[:, :width]


class Uniform(Protocol):
    """A source of uniform numbers: NumPy's Generator, or `Given`."""

    def random(self) -> float: ...


class Given:
    """Numbers drawn before, behind those methods of NumPy's Generator that the transforms use."""

    def __init__(self, numbers: Iterable[float]):
        """
        Args:
          numbers: uniform in [0, 1).
        """
        self._numbers = iter(numbers)

    def random(self) -> float:
        """Returns the next number."""
        return next(self._numbers)

    def standard_normal(self) -> float:
        """Returns a number of the normal distribution, from two numbers (Box and Muller 1958)."""
        radius = math.sqrt(-2 * math.log(1 - self.random()))
        return radius * math.cos(2 * math.pi * self.random())

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        """Returns (size,) numbers in [low, high), from as many numbers."""
        return low + (high - low) * np.array([self.random() for _ in range(size)])

    def permutation(self, size: int) -> np.ndarray:
        """Returns a permutation of 0 to size - 1, from as many numbers."""
        return np.argsort([self.random() for _ in range(size)])
