"""Threads for work that waits for the disk."""

from collections.abc import Callable, Collection
import concurrent.futures

from tqdm import tqdm

THREADS = 16  # for what waits for the disk, not for the processor


def in_threads(
    verb: str, unit: str, function: Callable, items: Collection, *args: Collection
) -> list:
    """[function(item, ...) for every item], in threads, with a progress bar on a terminal."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(function, items, *args)
        # `disable=None`: no bar where stderr is not a terminal.
        return list(tqdm(results, verb, len(items), disable=None, unit=f" {unit}", leave=False))
