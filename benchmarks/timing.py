"""Times several functions in turn, and computes the ratios of their speeds.

The speed of a machine drifts. So each repetition times every function once, and ratios are taken
within a repetition.
"""

from collections.abc import Callable, Hashable, Mapping
import time

import numpy as np


def measure(
    runs: Mapping[Hashable, Callable[[], object]], repetitions: int
) -> dict[Hashable, np.ndarray]:
    """Returns the seconds of every repetition; the functions must already have run once."""
    times = {key: [] for key in runs}
    for _ in range(repetitions):
        for key, function in runs.items():
            start = time.perf_counter()
            function()
            times[key].append(time.perf_counter() - start)
    return {key: np.array(seconds) for key, seconds in times.items()}


def speed_ratio(seconds: np.ndarray, reference: np.ndarray) -> str:
    """Returns the speed over that of the reference: the median, and the quartiles in brackets."""
    low, median, high = np.percentile(reference / seconds, [25, 50, 75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
