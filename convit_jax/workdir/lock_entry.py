"""The bytes of a lock: in a file that is locked with `flock`, or in an object of a bucket."""

import contextlib
import errno
import fcntl
import pathlib

from convit_jax import storage


class FileEntry:
    """The bytes of a lock in a local file."""

    settles = False  # whether a simultaneous start shows only after the write

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = path.open("a+b", buffering=0)

    def lock(self) -> bool | None:
        """Locks the file.

        Returns:
          True if it is locked, False if another process of this host holds it, None if the file
          system has no locks.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        return True

    def read(self) -> bytes:
        """Returns the bytes; none if the file cannot be read."""
        try:
            return self._path.read_bytes()
        except OSError:
            return b""

    def create(self, data: bytes) -> None:
        """Writes the first bytes: into the file that is open."""
        self.write(data)

    def write(self, data: bytes) -> None:
        """Replaces the bytes."""
        self._file.truncate(0)  # the file is opened for appending: writes go to its end
        self._file.write(data)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._file.truncate(0)

    def close(self) -> None:
        self._file.close()


class ObjectEntry:
    """The bytes of a lock in an object of a bucket."""

    settles = True

    def __init__(self, path: pathlib.Path):
        self._path = path

    def lock(self) -> None:
        """Returns None: buckets have no locks."""

    def read(self) -> bytes:
        """Returns the bytes; none without an object. Raises OSError if the bucket does not say.

        One request reads them. An open file would be read by several, which fail if the holder
        writes the object between them.
        """
        try:
            return storage.read_bytes(self._path)
        except FileNotFoundError:
            return b""

    def create(self, data: bytes) -> None:
        """Writes a new object. Raises FileExistsError if there is one."""
        storage.create_object(self._path, data)

    def write(self, data: bytes) -> None:
        """Replaces the bytes."""
        with storage.whole_file(self._path) as unfinished:
            unfinished.write_bytes(data)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        pass
