"""Copies of the files of a data set on a local disk, for data in a bucket or on a slow disk."""

from collections.abc import Iterable, Mapping
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
    there = {}
    for path, version in zip(paths, storage.versions(paths), strict=True):
        if version is None:
            raise FileNotFoundError(f"{path}: no such shard; copy or prepare the data set again")
        there[path] = version
    source = storage.as_path(paths[0]).parent
    folder = _place(source, pathlib.Path(cache).expanduser().absolute())
    if _outdated(there, folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"data.cache={cache}: expected a folder that can be written: {error.strerror}"
            raise type(error)(error.errno, text, os.fspath(folder)) from error
        wait = f"data.cache: waiting for another process that copies to {folder}"
        with storage.locked(folder, wait=wait) as is_locked:
            # Left by a process that was killed. Without a lock another one may be writing them.
            for unfinished in folder.glob("*.part") if is_locked else ():
                unfinished.unlink()
            _copy(_outdated(there, folder), folder, cache)
    return folder


def _place(source: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """Returns the folder for the copies of a folder, which no other folder shares."""
    if storage.is_bucket(source):
        scheme, _, name = os.fspath(source).partition("://")
        return cache / scheme / name
    return cache / "file" / source.absolute().relative_to(source.absolute().anchor)


def _outdated(
    there: Mapping[str, storage.Version], folder: pathlib.Path
) -> dict[str, storage.Version]:
    """Returns the files that have no copy in a folder, or the copy of an older version."""
    copies = storage.versions([os.path.join(folder, os.path.basename(path)) for path in there])
    return {
        path: version
        for (path, version), copy in zip(there.items(), copies, strict=True)
        if not copy or (copy.size, copy.modified) != (version.size, version.modified)
    }


def _copy(files: Mapping[str, storage.Version], folder: pathlib.Path, cache: str) -> None:
    """Copies files in parallel, if the disk has room for them."""
    if not files:
        return  # another process has copied them
    source = os.path.dirname(next(iter(files)))
    needed, free = sum(version.size for version in files.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"data.cache={cache}: expected {needed:,} bytes of free disk for {len(files):,} files "
            f"of {source}, found {free:,}: make room, choose another disk, or leave data.cache "
            f"empty",
            os.fspath(folder),
        )
    copies = [folder / os.path.basename(path) for path in files]
    old = sum(copy.exists() for copy in copies)
    changed = f"; {old:,} of them have changed since they were copied" if old else ""
    log.info(
        "data.cache: copying %s files, %s bytes, of %s to %s%s",
        f"{len(files):,}", f"{needed:,}", source, folder, changed,
    )  # fmt: skip
    start = time.monotonic()
    in_threads("Copying", "files", storage.fetch, files, copies)
    log.info("data.cache: copied and checked, in %.0f s", time.monotonic() - start)
