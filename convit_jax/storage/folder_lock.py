"""A lock of a folder on a local disk, among the processes of a host."""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: pathlib.Path, *, wait: str = "") -> Iterator[bool]:
    """Locks a folder against other processes until the end of the block or of this process.

    Yields whether the folder is locked: some network file systems have no locks. Without a lock
    another process may be writing to the folder.

    Args:
      folder: an existing folder.
      wait: line to log before waiting for another process that holds the lock; empty does not wait.

    Raises:
      BlockingIOError: if another process holds the lock, and `wait` is empty.
    """
    import fcntl  # does not exist on Windows

    handle = os.open(folder, os.O_RDONLY)
    is_locked = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise BlockingIOError(
                    error.errno, "another process is writing here", str(folder)
                ) from None
            log.info("%s", wait)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            is_locked = False
            log.warning("%s: cannot be locked (%s): let one process write at a time", folder, error)
        yield is_locked
    finally:
        os.close(handle)
