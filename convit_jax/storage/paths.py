"""Paths of local files, and of objects in buckets."""

import functools
import importlib
import os
import pathlib
from typing import Any, cast

from convit_jax import extras
from convit_jax.storage.retries import patience

# Scheme of a URL -> the package that reads and writes it, and the extra of setup.cfg that has it.
# The module of this package with the name of the extra adds retries to it.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is a URL, such as gs://BUCKET/NAME, and not a local file or folder."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a local file or folder, with "~" expanded, or of an object in a bucket.

    The path of an object is an `etils.epath.Path`, which has the methods of pathlib. A folder in a
    bucket is no more than the beginning of the names of objects: making one does nothing, and one
    without objects does not exist.

    Args:
      path: a local path, gs://BUCKET/NAME or s3://BUCKET/NAME.

    Raises:
      ValueError: if it is a URL of another kind, or names no bucket.
      ModuleNotFoundError: if the package is missing that reads and writes such a bucket.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return pathlib.Path(text).expanduser()
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES or not rest.partition("/")[0]:
        expected = " or ".join(f"{scheme}://BUCKET/NAME" for scheme in SCHEMES)
        raise ValueError(f"expected a local path, {expected}, got {text!r}")
    _load(scheme)
    from etils import epath

    return cast(pathlib.Path, epath.Path(text))


@functools.cache
def _load(scheme: str) -> None:
    """Imports the package for a kind of bucket and sets it up; only once in a process."""
    package, extra = SCHEMES[scheme]
    # gcsfs asks for the kind of each bucket by gRPC, which no emulator speaks and some proxies
    # block: without an answer it tries for minutes.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # TensorStore, which writes checkpoints, would wait for ever for an answer.
    silence = str(max(1, round(patience().silence)))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", silence)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", silence)
    # Where TensorFlow is installed, epath would use its file systems, which have neither these
    # settings nor S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    with extras.needed(extra, f"{scheme}://"):
        __import__(package)
        import fsspec

    # A listing that is kept hides what other processes have written since.
    for protocol in {scheme, "gcs" if scheme == "gs" else scheme}:
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # botocore makes 10 requests at a time, and the images of a batch are requested together.
    options = fsspec.config.conf.setdefault("s3", {}).setdefault("config_kwargs", {})
    options.setdefault("max_pool_connections", 64)
    # Everybody who opens a bucket through fsspec gets ours: epath too, and so Orbax, JAX and tfds.
    file_system = importlib.import_module(f"convit_jax.storage.{extra}").FileSystem
    for protocol in file_system.protocol:
        fsspec.register_implementation(protocol, file_system, clobber=True)


def opened(path: str | os.PathLike) -> tuple[Any, str]:
    """Returns the file system of a bucket, from fsspec, and the name of an object there."""
    text = os.fspath(as_path(path))  # sets up the package that reads such buckets
    import fsspec

    return fsspec.core.url_to_fs(text)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns a path that does not depend on the working directory."""
    return path if is_bucket(path) else path.resolve()


def refuse_pattern(path: pathlib.Path, key: str) -> None:
    """Refuses the URL of a folder that fsspec would take for a pattern when it deletes objects.

    Args:
      path: a local folder, which may have any name, or one in a bucket.
      key: flag or argument that the path is the value of.

    Raises:
      ValueError: if it is a URL with a character of patterns.
    """
    if is_bucket(path) and set(os.fspath(path)) & set("*?[]"):
        raise ValueError(
            f"{key}: expected a URL without * ? [ and ], which stand for other characters when "
            f"objects are deleted, got {os.fspath(path)}"
        )


def make_folder(path: pathlib.Path) -> None:
    """Makes a local folder and its parents if they are missing.

    Does nothing in a bucket: fsspec would make a bucket that is missing, or misspelt.
    """
    if not is_bucket(path):
        path.mkdir(parents=True, exist_ok=True)
