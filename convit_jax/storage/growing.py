"""Files that grow while a run lasts, on disk and in buckets."""

import os
import pathlib
import time

from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file

_UPLOAD_EVERY = 60.0  # seconds between two uploads of an object that grows


class GrowingFile:
    """A file that bytes are appended to. Its old content stays.

    On disk, every write is appended at once. Objects in buckets cannot be appended to: their
    content is kept in memory and uploaded whole by `upload`, by `close`, and by the first write
    that comes a minute after the last upload. Only one process may write an object.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens a file, which need not exist.

        Raises:
          OSError: if it cannot be opened or read.
        """
        path = as_path(path)
        self._object = _Object(path) if is_bucket(path) else None
        # Unbuffered, so that a killed run leaves whole lines, and a failed write is not tried again
        # when the file is closed.
        self._file = None if self._object else path.open("ab", buffering=0)

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Appends bytes. Raises OSError if they cannot be written."""
        if self._object is not None:
            self._object.write(data)
        elif self._file is not None:
            while data:
                data = data[self._file.write(data) :]

    def upload(self) -> None:
        """Uploads what an object in a bucket lacks; does nothing on disk.

        Raises:
          OSError: if it cannot be uploaded.
        """
        if self._object is not None:
            self._object.upload()

    def close(self) -> None:
        """Uploads what an object lacks, or closes the file."""
        self.upload()
        if self._file is not None:
            self._file.close()


class _Object:
    """The content of an object that grows."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self._content = bytearray(path.read_bytes())
        except FileNotFoundError:
            self._content = bytearray()
        self._uploaded, self._when = len(self._content), time.monotonic()

    def write(self, data: bytes) -> None:
        self._content += data
        if time.monotonic() - self._when > _UPLOAD_EVERY:
            self.upload()

    def upload(self) -> None:
        if self._uploaded == len(self._content):
            return
        # Also if it fails, so that closing the file does not hide the error by trying again.
        self._uploaded, self._when = len(self._content), time.monotonic()
        with whole_file(self._path) as unfinished:
            unfinished.write_bytes(self._content)
