"""What goes wrong while Orbax and TensorStore read or write a checkpoint, in one line."""

from collections.abc import Iterator
import contextlib
import functools
import logging
import os
import pathlib
import re
import sys
from typing import Any

from convit_jax import storage

# TensorStore begins the text of an error with the name of a status.
_REFUSED = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}
_UNREACHABLE = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
# The end of its text: the object, as a URL or as a name in the bucket, and what happened.
_LAST_PLACE = re.compile(
    r".*(?:Error (?:reading|writing)(?: Byte range \S+ \S+ of)?|database at) "
    r"(?:\"([^\"]+)\"|([^\"]+?)): (.*)"
)
_RETRIED = re.compile(r"All (\d+) retry attempts failed: ")


def first_line(error: Exception) -> str:
    """Returns what an error says, without the description of the array that TensorStore adds."""
    return re.split(r"\n| \[tensorstore_spec=", str(error))[0][:400]


def outage(error: Exception, folder: pathlib.Path) -> OSError | None:
    """Returns the error of a storage that did not answer, or refused, after all retries.

    Returns None for another error. After an outage the checkpoint may be intact.

    Args:
      error: an error of Orbax.
      folder: what was read or written.
    """
    if behind := storage.outage_behind(error):
        return behind
    name, _, text = str(error).partition(": ")
    if name not in (*_REFUSED, *_UNREACHABLE):
        return None
    if not storage.is_bucket(folder):
        return OSError(f"{folder}: {first_line(error)}")
    return _of_tensorstore(text, folder, _REFUSED.get(name))


def _of_tensorstore(
    text: str, folder: pathlib.Path, status: int | None = None
) -> storage.BucketError:
    """Returns the error of a request of TensorStore; its text may tell another status."""
    plain = re.split(r"\n| \[\w+=", text)[0]
    found = _LAST_PLACE.fullmatch(plain)
    place, said = (found[1] or found[2], found[3]) if found else (os.fspath(folder), plain)
    if "://" not in place:  # on S3 the bucket is left out
        place = "/".join([*os.fspath(folder).split("/")[:3], place])
    code = re.search(r"http_response_code='(\d+)'", text)
    tried = _RETRIED.match(said)
    said = _RETRIED.sub("", said).removesuffix("Unknown")  # its name for most answers of S3
    tries = int(tried[1]) if tried else 1
    return storage.failure(place, int(code[1]) if code else status, said, tries)


@contextlib.contextmanager
def as_os_error(folder: pathlib.Path) -> Iterator[None]:
    """Turns errors of the file system, which Orbax raises as ValueError, into OSError."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is not None:
            reason = os.strerror(number)
        elif str(error).startswith("NOT_FOUND: ") and storage.is_bucket(folder):
            reason = str(_of_tensorstore(str(error), folder, 404))  # only a bucket can be missing
        elif storage.is_bucket(folder):
            reason = str(outage(error, folder) or first_line(error))
        else:
            raise
        raise OSError(
            f"{folder}: cannot write a checkpoint: {reason}. Earlier ones are kept: "
            "the same command continues from the newest"
        ) from error


@functools.cache
def hide_late_answers() -> None:
    """Hides the tracebacks of TensorStore's answers to requests that nobody waits for any more.

    When one array cannot be written, Orbax raises its error and closes the event loop that waits
    for all arrays. TensorStore hands a later answer, which finds a closed loop, to
    `sys.unraisablehook`. An answer that nobody has read is logged by asyncio.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and unraisable.object is None
        if not (late and str(unraisable.exc_value) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_is_read)


def _is_read(record: logging.LogRecord) -> bool:
    """Returns whether a line of asyncio's log is about something else than an unread answer."""
    unread = record.getMessage().startswith("Future exception was never retrieved")
    return not (unread and "tensorstore_spec=" in record.getMessage())
