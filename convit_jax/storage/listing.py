"""Lists what is in a bucket, and says which version of a file is there."""

from collections.abc import Collection
import datetime
import os
import stat
from typing import Any, NamedTuple

from convit_jax.storage.calls import begin, result
from convit_jax.storage.paths import is_bucket

# What changes with the content of an object, the best first: Google's checksum, S3's entity tag.
_MARKS = ("crc32c", "ETag", "etag", "generation", "mtime")


class Version(NamedTuple):
    """What is known of the content of a file without reading it.

    Attributes:
      size: in bytes.
      mark: changes when the content does: a checksum, or the time of the last change on disk.
      modified: when it was written, in whole seconds since 1970.
    """

    size: int
    mark: str
    modified: int


class Children(NamedTuple):
    """The names directly in a folder, sorted, with the versions of the files."""

    folders: tuple[str, ...]
    files: dict[str, Version]


def children(path: str) -> Children:
    """Lists one folder in a bucket.

    Raises:
      FileNotFoundError: if there is no object in it.
      OSError: if it cannot be listed.
    """
    path = path.rstrip("/")
    entries = result(begin(path, "_ls", detail=True), path)
    folders, files = set(), {}
    start = _name(path)
    for entry in entries:
        name = _name(entry["name"]).removeprefix(start).strip("/")
        if not name:  # a marker of the folder itself
            continue
        if entry["type"] == "directory":
            folders.add(name)
        else:
            files[name] = version_of(entry)
    if not folders and not files:
        raise FileNotFoundError(f"{path}: no such folder in the bucket")
    return Children(tuple(sorted(folders)), dict(sorted(files.items())))


def below(path: str) -> list[str]:
    """Lists all objects below a folder in a bucket, at any depth, by one request for each 1,000.

    Returns:
      Their names relative to the folder, sorted.

    Raises:
      OSError: if they cannot be listed.
    """
    path = path.rstrip("/")
    start = f"{_name(path)}/"
    names = result(begin(path, "_find"), path)
    found = (_name(name) for name in names if not name.endswith("/"))
    return sorted(name.removeprefix(start) for name in found if name.startswith(start))


def matching(pattern: str) -> list[str]:
    """Returns the URLs of the objects that match a pattern such as gs://BUCKET/photos/*.jpg.

    Raises:
      OSError: if the bucket cannot be listed.
    """
    scheme = pattern.partition("://")[0]
    entries = result(begin(pattern, "_glob", detail=True), pattern)
    return [f"{scheme}://{name}" for name, entry in entries.items() if entry["type"] == "file"]


def is_folder(path: str | os.PathLike) -> bool:
    """Returns whether there is a folder, on disk or in a bucket.

    Raises:
      OSError: if a bucket cannot be listed.
    """
    if not is_bucket(path):
        return os.path.isdir(path)
    path = os.fspath(path).rstrip("/")
    try:
        return result(begin(path, "_info"), path)["type"] == "directory"
    except FileNotFoundError:
        return False


def versions(paths: Collection[str]) -> list[Version | None]:
    """Returns the version of each file, on disk or in a bucket; None for one that is missing.

    The files of a folder in a bucket are asked for together.
    """
    folders: dict[str, dict[str, Version]] = {}
    found: list[Version | None] = []
    for path in paths:
        if not is_bucket(path):
            found.append(_on_disk(path))
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            try:
                folders[folder] = children(folder).files
            except FileNotFoundError:
                folders[folder] = {}
        found.append(folders[folder].get(name))
    return found


def size(path: str | os.PathLike) -> int:
    """Returns the number of bytes of a file, on disk or in a bucket.

    Raises:
      OSError: if it does not exist, or cannot be asked for.
    """
    if not is_bucket(path):
        return os.path.getsize(path)
    return int(result(begin(os.fspath(path), "_info"), os.fspath(path))["size"])


def _on_disk(path: str) -> Version | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return Version(found.st_size, str(found.st_mtime_ns), int(found.st_mtime))


def _name(path: str) -> str:
    """Returns BUCKET/NAME of a URL or of a name in a listing."""
    return path.partition("://")[2] or path


def version_of(entry: dict[str, Any]) -> Version:
    """Returns the version of an object from what gcsfs or s3fs say of it."""
    mark = next((str(entry[key]) for key in _MARKS if entry.get(key)), "")
    written = entry.get("LastModified") or datetime.datetime.fromisoformat(entry["timeCreated"])
    return Version(int(entry["size"]), mark, int(written.timestamp()))
