"""Times of several things taken turn by turn, and their ratios.

The speed of a machine wanders, so each repetition times every contender once, and ratios are taken
repetition by repetition.
"""

from collections.abc import Callable, Hashable, Mapping
import time

import numpy as np


def measure(
    runs: Mapping[Hashable, Callable[[], object]], repetitions: int
) -> dict[Hashable, np.ndarray]:
    """Seconds of every repetition of functions that have run, and compiled, before."""
    times = {key: [] for key in runs}
    for _ in range(repetitions):
        for key, function in runs.items():
            start = time.perf_counter()
            function()
            times[key].append(time.perf_counter() - start)
    return {key: np.array(seconds) for key, seconds in times.items()}


def speed_ratio(seconds: np.ndarray, reference: np.ndarray) -> str:
    """How many times as fast as the reference: the median, and the quartiles in brackets."""
    low, median, high = np.percentile(reference / seconds, [25, 50, 75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
