"""Lists folders of images, on disk or in a bucket: subfolders, images, and what is neither."""

import collections
from collections.abc import Iterable
import dataclasses
import os

from convit_jax import storage

# Those of torchvision's ImageFolder, .jfif (a JPEG), .gif (its first frame is read) and the kinds
# that phones write: .avif, .heic and .heif.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".avif", ".heic", ".heif",
)  # fmt: skip
# What archives and operating systems leave behind, in lower case. Hidden names begin with a dot.
LEFTOVERS = frozenset({
    "__macosx", "@eadir", "#recycle", "@recycle", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip

LeftOut = collections.Counter[str]  # {kind of file or folder: how many}; "(s)" marks the plural


@dataclasses.dataclass(frozen=True)
class Listing:
    """The content of one folder.

    Attributes:
      path: the folder.
      folders: names of its subfolders, sorted.
      images: names of the images directly in it, sorted.
      left_out: what is neither.
    """

    path: str
    folders: tuple[str, ...]
    images: tuple[str, ...]
    left_out: LeftOut


@dataclasses.dataclass(frozen=True)
class Tree:
    """The images below a folder.

    Attributes:
      top: the content of the folder itself.
      images: paths of all images relative to the folder, with "/", in the order of torchvision's
        ImageFolder.
      left_out: what is neither an image nor a folder of images, at any depth.
    """

    top: Listing
    images: list[str]
    left_out: LeftOut


def scan(path: str) -> Listing:
    """Lists one folder. It asks the disk about links only, not about every file.

    Raises:
      OSError: if the folder cannot be read.
    """
    if storage.is_bucket(path):
        there = storage.children(path)
        return _sorted_out(path, there.folders, there.files)
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    return _sorted_out(path, folders, files)


def _sorted_out(path: str, folders: Iterable[str], files: Iterable[str]) -> Listing:
    """Returns the content of a folder, from the names in it, and counts what is left out."""
    kept: list[str] = []
    images: list[str] = []
    left_out = LeftOut()
    for name, is_folder in (*((n, True) for n in folders), *((n, False) for n in files)):
        if name.casefold() in LEFTOVERS:
            left_out[f"of {name.strip()}"] += 1
        elif name.startswith("."):
            left_out["hidden folder(s)" if is_folder else "hidden file(s)"] += 1
        elif is_folder:
            kept.append(name)
        elif name.lower().endswith(EXTENSIONS):
            images.append(name)
        else:
            left_out[os.path.splitext(name)[1].lower() or "file(s) without a suffix"] += 1
    return Listing(path, tuple(sorted(kept)), tuple(sorted(images)), left_out)


def walk(path: str) -> Tree:
    """Lists a folder at every depth. Links to folders are followed, unless they lead back up.

    Raises:
      OSError: if a folder cannot be read.
    """
    look = _all_below(path).__getitem__ if storage.is_bucket(path) else scan
    top = look(path)
    found, left_out, pending = [], LeftOut(), [("", top)]
    while pending:
        inside, listing = pending.pop()
        found.append((inside, listing.images))
        left_out.update(listing.left_out)
        for name in listing.folders:
            below = os.path.join(listing.path, name)
            if os.path.islink(below) and _is_inside(listing.path, below):
                left_out["link(s) to a folder above"] += 1
            else:
                pending.append((f"{inside}/{name}" if inside else name, look(below)))
    # ImageFolder sorts the paths of the folders, then the names in each folder.
    found.sort(key=lambda item: item[0])
    images = [f"{inside}/{name}" if inside else name for inside, names in found for name in names]
    return Tree(top, images, left_out)


def _all_below(path: str) -> dict[str, Listing]:
    """Lists a folder in a bucket at every depth, without a request for each folder."""
    inside: dict[str, tuple[set[str], list[str]]] = {path: (set(), [])}
    for name in storage.below(path):
        *folders, file = name.split("/")
        where = path
        for folder in folders:
            inside[where][0].add(folder)
            where = os.path.join(where, folder)
            inside.setdefault(where, (set(), []))
        inside[where][1].append(file)
    return {where: _sorted_out(where, *found) for where, found in inside.items()}


def left_out_text(left_out: LeftOut) -> str:
    """Returns the twelve commonest kinds of what is left out, each with its number."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:12]
    parts = [f"{count:,} {kind.replace('(s)', 's' * (count > 1))}" for kind, count in kinds]
    if rest := left_out.total() - sum(count for _, count in kinds):
        parts.append(f"{rest:,} of other kinds")
    return ", ".join(parts)


def _is_inside(path: str, folder: str) -> bool:
    inner, outer = (os.path.join(os.path.realpath(name), "") for name in (path, folder))
    return inner.startswith(outer)
