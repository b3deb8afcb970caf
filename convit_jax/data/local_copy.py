"""Copies of the files of a data set on a local disk, for data in a bucket or on a slow disk."""

from collections.abc import Iterable
import errno
import logging
import os
import pathlib
import shutil
import time

from convit_jax import storage
from convit_jax.data.threads import in_threads

log = logging.getLogger(__name__)


def copied(paths: Iterable[str], cache: str) -> pathlib.Path:
    """Copies files to a local disk unless they are there, and returns the folder of the copies.

    A copy appears when it is whole and checked, so a start after an interruption copies the rest.
    A file is copied again if its size or modification time is not that of the copy. One process of
    a host copies, while the others wait for it.

    Args:
      paths: the files, which are in one folder, on a disk or in a bucket.
      cache: folder on a local disk. The copy of gs://BUCKET/NAME is in `cache`/gs/BUCKET, that of a
        local file in `cache`/file.

    Raises:
      ValueError: if `cache` is not a local folder.
      FileNotFoundError: if a file is missing.
      OSError: if a file cannot be read, or `cache` has too little space or cannot be written.
    """
    if storage.is_bucket(cache):
        raise ValueError(f"data.cache: expected a folder on a local disk, got {cache!r}")
    paths = sorted(set(paths))
    source = storage.as_path(paths[0]).parent
    listed = storage.files_in(source)
    names = [os.path.basename(path) for path in paths]
    if absent := [name for name in names if name not in listed]:
        raise FileNotFoundError(
            f"{source}: {len(absent):,} of {len(names):,} files are missing, the first is "
            f"{absent[0]}; copy or prepare the data set again"
        )
    entries = {name: listed[name] for name in names}
    folder = _place(source, pathlib.Path(cache).expanduser().absolute())
    if _missing(folder, entries):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"data.cache={cache}: expected a folder that can be written: {error.strerror}"
            raise type(error)(error.errno, text, os.fspath(folder)) from error
        wait = f"data.cache: waiting for another process that copies to {folder}"
        with storage.locked(folder, wait=wait):
            for unfinished in folder.glob("*.part"):  # left by a process that was killed
                unfinished.unlink()
            _copy(source, folder, _missing(folder, entries), cache)
    return folder


def _place(source: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """Returns the folder for the copies of a folder, which no other folder shares."""
    if storage.is_bucket(source):
        scheme, _, name = os.fspath(source).partition("://")
        return cache / scheme / name
    return cache / "file" / source.absolute().relative_to(source.absolute().anchor)


def _missing(folder: pathlib.Path, entries: dict[str, storage.Entry]) -> dict[str, storage.Entry]:
    """Returns the entries of the files that have no copy, or the copy of an older file."""
    there = storage.files_in(folder) if folder.is_dir() else {}
    return {name: entry for name, entry in entries.items() if there.get(name) != entry}


def _copy(
    source: pathlib.Path, folder: pathlib.Path, entries: dict[str, storage.Entry], cache: str
) -> None:
    """Copies files in parallel, if the disk has room for them."""
    if not entries:
        return  # another process has copied them
    needed, free = sum(entry.size for entry in entries.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"data.cache={cache}: expected {needed:,} bytes of free disk for {len(entries):,} "
            f"files of {source}, found {free:,}: make room, choose another disk, or leave "
            f"data.cache empty",
            os.fspath(folder),
        )
    old = sum((folder / name).exists() for name in entries)
    changed = f"; {old:,} of them have changed since they were copied" if old else ""
    log.info(
        "data.cache: copying %s files, %s bytes, of %s to %s%s",
        f"{len(entries):,}", f"{needed:,}", source, folder, changed,
    )  # fmt: skip
    start = time.monotonic()
    in_threads(
        "Copying", "files", lambda name: storage.fetch(source / name, folder / name), entries
    )
    log.info("data.cache: copied and checked, in %.0f s", time.monotonic() - start)
