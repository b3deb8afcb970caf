"""The lock of a workdir: one run trains in it at a time.

The lock is a file that its holder locks with `flock` and writes anew every few seconds. The
operating system frees the lock when the holder ends, however it ends. Between hosts `flock` may do
nothing, depending on the network file system. So a start that finds the name of another host in the
file waits to see whether that host still writes it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from typing import Any, Self

from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

_BEAT = 10.0  # seconds between two writes of the holder
_WAIT = 30.0  # seconds to wait for a write of another host


class Lock:
    """Holds the lock of a workdir, until the end of the `with` block or of the process."""

    def __init__(self, workdir: Workdir):
        """Takes the lock; makes the folder if it is missing.

        Raises:
          OSError: if another process holds the lock; the message says which. Also if the file
            cannot be written.
        """
        self._path = workdir.lock
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b", buffering=0)
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._beats = 0
        self._ended = threading.Event()
        try:
            self._take()
            self._write()
        except BaseException:
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()

    def _take(self) -> None:
        """Locks the file and waits until it is clear that no other host uses the folder."""
        works = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal(self._read()) from None
            works = False  # a file system without locks
        holder = self._read()
        if not holder or (works and holder.get("host") == socket.gethostname()):
            return  # released, or held by a process of this host that has ended
        log.info(
            "%s was not released by %s: waiting %.0f s to see whether it still runs",
            self._path.parent, _who(holder), _WAIT,
        )  # fmt: skip
        end = time.monotonic() + _WAIT
        while time.monotonic() < end:
            time.sleep(min(1.0, _WAIT / 10))
            now = self._read()
            if now and now != holder:  # empty: released, or read while it is written
                raise self._refusal(now)
        log.info("%s: %s no longer runs; taking over", self._path.parent, _who(holder))

    def _refusal(self, holder: dict[str, Any]) -> OSError:
        return OSError(
            f"{self._path.parent}: {_who(holder)} trains in this folder. Wait until it ends, stop "
            f"it, or choose another --workdir. If no such process runs, delete {self._path}"
        )

    def _read(self) -> dict[str, Any]:
        """Returns the holder's entry; empty if the lock was released or the entry is torn."""
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        entry = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": self._since,
            "beats": self._beats,
        }
        self._file.truncate(0)  # the file is opened for appending: writes go to its end
        self._file.write(json.dumps(entry).encode() + b"\n")

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self._beats += 1
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere
                self._write()


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return (
        f"process {holder.get('process')} on host {holder.get('host')} (since "
        f"{holder.get('since')})"
    )
