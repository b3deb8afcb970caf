"""The order in which class folders are numbered."""

from collections.abc import Iterable
import re

from convit_jax import storage
from convit_jax.data.first_names import first_names

ORDERS = ("sorted", "natural")


def is_file(order: str) -> bool:
    """Returns whether a value of data.class_order is the path of a list of the classes."""
    return order not in ORDERS


def in_order(folders: Iterable[str], order: str, where: str) -> tuple[str, ...]:
    """Orders the names of class folders.

    Args:
      folders: names of the class folders.
      order: "sorted" by character codes; "natural", with 2 before 10; or the path of a file that
        lists all classes, one a line.
      where: the folder of the class folders, for error messages.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file does not list exactly the class folders.
    """
    folders = sorted(folders)
    if order == "sorted":
        return tuple(folders)
    if order == "natural":
        return tuple(sorted(folders, key=_natural))
    listed = _read(order)
    twice = sorted({name for name in listed if listed.count(name) > 1})
    lacking, unknown = sorted({*folders} - {*listed}), sorted({*listed} - {*folders})
    problems = [
        f"{text}: {first_names(names, repr)}"
        for text, names in (
            ("folders that the list lacks", lacking),
            ("names without a folder", unknown),
            ("names listed twice", twice),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"data.class_order: expected {order} to list the {len(folders):,} class folders in "
            f"{where}, each once; got {'; '.join(problems)}"
        )
    return tuple(listed)


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key: runs of digits compare as numbers, and come before text. Ties go by characters."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in parts if x], name


def _read(path: str) -> list[str]:
    file = storage.as_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"data.class_order: expected {' or '.join(ORDERS)} or a file that lists the classes, "
            f"one a line; got {path!r}, and there is no file {file.absolute()}"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(f"data.class_order: {path} cannot be read: {error}") from error
    return [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
