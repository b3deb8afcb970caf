"""Arrays that take long to make, such as indices, stored until the shards change."""

from collections.abc import Callable, Collection
import hashlib
import io
import logging
import os
from typing import BinaryIO
import zipfile

import numpy as np

from convit_jax import storage

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def fingerprint(paths: Collection[str], versions: Collection[storage.Version | None]) -> str:
    """Returns a hash that changes when the path or the version of a file changes.

    Raises:
      FileNotFoundError: if a file is missing.
    """
    digest = hashlib.sha256()
    for path, version in zip(paths, versions, strict=True):
        if version is None:
            raise FileNotFoundError(f"{path}: it is gone; copy or prepare it again")
        name = path if storage.is_bucket(path) else os.path.abspath(path)
        digest.update(f"{name}\0{version.size}\0{version.mark}\n".encode())
    return digest.hexdigest()


def cache_file(folder: str | None, name: str) -> str | None:
    """Returns the path of an .npz file in a cache folder; None if there is no cache folder."""
    return None if folder is None else os.path.join(os.path.expanduser(folder), f"{name}.npz")


def cached(path: str | None, key: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns build(), or its stored result from `path` if that was stored under the same key.

    Args:
      path: .npz file that stores the result, on disk or in a bucket; None stores nothing.
      key: a hash of everything that the result depends on.
      build: makes the arrays.

    Raises:
      OSError: if `path` is in a bucket that cannot be read.
    """
    if path is None:
        return build()
    try:
        # Opened here, because numpy does not close a file that turns out to be damaged.
        with _opened(path) as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) == key:
                return {name: arrays[name] for name in arrays.files if name != "key"}
    except FileNotFoundError:
        pass
    except storage.BucketError:
        raise  # the result may be there, and take hours to build again
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: not readable, so it is built again: %s", path, error)
    arrays = build()
    try:
        if not storage.is_bucket(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with storage.whole_file(path) as unfinished, unfinished.open("wb") as out:
            np.savez(out, allow_pickle=False, key=np.array(key), **arrays)
    except OSError as error:
        log.warning("%s: not written, so the next start builds it again: %s", path, error)
    return arrays


def _opened(path: str) -> BinaryIO:
    """Opens a file; one in a bucket is read at once, since numpy reads many small parts."""
    if storage.is_bucket(path):
        return io.BytesIO(storage.as_path(path).read_bytes())
    return open(path, "rb")
