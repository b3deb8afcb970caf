"""Writing files whole or not at all. No other module of this package replaces a file."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import socket


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *kinds: type[Exception]) -> Iterator[pathlib.Path]:
    """Yields a path to write to. It becomes `path` if the block succeeds, and is deleted if not.

    A reader sees the old file or the new one, never a part of it, even after a power cut. Two
    processes, on one host or two, may write the same file at a time: the last to finish wins.

    Args:
      path: the file to write.
      *kinds: types of exceptions, besides OSError, that the writer raises if the file system fails.

    Raises:
      OSError: if the file cannot be written; the message names `path`.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes files that other users cannot read
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except Exception as error:
        if not isinstance(error, (OSError, *kinds)):
            raise
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or error
        raise OSError(number, f"cannot be written: {reason}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      OSError: if the file cannot be written; the message names `path`.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text)
