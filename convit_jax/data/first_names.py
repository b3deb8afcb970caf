"""Names in messages: the first few of a list that may be long."""

from collections.abc import Callable, Iterable

_SHOWN = 5


def first_names(names: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Returns the first five names and the number of others: "a, b, c, d, e and 1,200 more".

    Args:
      names: the names.
      show: how a name is written; `repr` puts it in quotes.
    """
    names = list(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(show, names[:_SHOWN])) + more
