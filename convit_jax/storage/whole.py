"""Writing files whole or not at all. No other module of this package replaces a file."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import socket
import tempfile

from convit_jax.storage.faults import BucketError
from convit_jax.storage.paths import as_path, is_bucket, opened


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *kinds: type[Exception]) -> Iterator[pathlib.Path]:
    """Yields a path to write to. It becomes `path` if the block succeeds, and is deleted if not.

    A reader sees the old file or the new one, never a part of it, even after a power cut. Two
    processes, on one host or two, may write the same file at a time: the last to finish wins.

    A file for a bucket is written in a temporary folder and uploaded when it is complete. A bucket
    shows an object only when all of it has arrived.

    Args:
      path: the file to write, on disk or in a bucket.
      *kinds: types of exceptions, besides OSError, that the writer raises if the file system fails.

    Raises:
      OSError: if the file cannot be written; the message names `path`.
    """
    path = as_path(path)
    written = _uploaded if is_bucket(path) else _replaced
    try:
        with written(path) as unfinished:
            yield unfinished
    except Exception as error:
        if isinstance(error, BucketError) or not isinstance(error, (OSError, *kinds)):
            raise
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or error
        raise OSError(number, f"cannot be written: {reason}", str(path)) from error


@contextlib.contextmanager
def _replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path beside `path`, which is renamed to `path` if the block succeeds."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes files that other users cannot read
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _uploaded(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path in a temporary folder, which is uploaded to `path` if the block succeeds."""
    with tempfile.TemporaryDirectory(prefix="convit") as folder:
        unfinished = pathlib.Path(folder, path.name)
        unfinished.touch()
        yield unfinished
        file_system, name = opened(path)
        file_system.put_file(os.fspath(unfinished), name)


def create_object(path: str | os.PathLike, data: bytes) -> None:
    """Writes an object of a bucket unless it exists. Of several processes, one succeeds.

    A few services that speak S3's protocol ignore the condition: there the last one wins.

    Raises:
      FileExistsError: if the object exists. It may be the one written here, if the answer to a
        first request was lost.
      OSError: if the object cannot be written; the message names it.
    """
    file_system, name = opened(path)
    file_system.pipe_file(name, data, mode="create")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      OSError: if the file cannot be written; the message names `path`.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text)
