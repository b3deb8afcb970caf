"""Writes folders of image files, for the tests. Most files hold no image: only names are listed."""

import os
import pathlib


def make_files(root: pathlib.Path, *paths: str) -> None:
    """Writes files below a folder; the content of each is its own path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))


def classes(folder: str, names: str = "cat dog", count: int = 3) -> list[str]:
    """Returns the paths of some images in class folders below a folder."""
    below = f"{folder}/" if folder else ""
    return [f"{below}{name}/{i:03}.jpg" for name in names.split() for i in range(count)]
