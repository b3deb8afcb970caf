"""Threads for work that mostly waits for the disk."""

from collections.abc import Callable, Collection
import concurrent.futures

from tqdm import tqdm

THREADS = 16  # more than one a core, since they mostly wait for the disk


def in_threads(
    verb: str, unit: str, function: Callable, items: Collection, *args: Collection
) -> list:
    """Returns [function(item, ...) for every item], computed in threads.

    Args:
      verb: text in front of the progress bar, which is shown on a terminal only.
      unit: name of the items in the progress bar, in the plural.
      function: called with one element of `items` and of each of `args`.
      items: first arguments of the calls.
      *args: further arguments of the calls, each as long as `items`.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(function, items, *args)
        # `disable=None` shows no bar if stderr is not a terminal.
        return list(tqdm(results, verb, len(items), disable=None, unit=f" {unit}", leave=False))
