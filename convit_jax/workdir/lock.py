"""The lock of a workdir: one run trains in it at a time.

The lock is a file or an object that its holder writes anew every few seconds. A file is locked with
`flock` as well: the operating system frees it when the holder ends, however it ends. Between hosts
`flock` may do nothing, depending on the network file system, and buckets have no locks at all. So a
start that finds an entry whose holder may still run waits to see whether it is written anew.

Two starts may find an object free at the same time. The bucket lets one of them create it. Some
buckets do not know this condition, and two starts may take over the same entry. So each writes its
own token and, after a moment, reads the object again. The one that reads the other's token gives
way. A write that took long may have come after the other's reading: then the other finds the
foreign token when it writes its entry anew, and ends.
"""

import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any, Self

from convit_jax import storage
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.lock_entry import FileEntry, ObjectEntry

log = logging.getLogger(__name__)

_BEAT = 10.0  # seconds between two writes of the holder
_WAIT = 30.0  # seconds to wait for a write of a holder that may still run
_SETTLE = 1.0  # seconds until the other of two simultaneous starts has written its token


class Lock:
    """Holds the lock of a workdir, until the end of the `with` block or of the process."""

    def __init__(self, workdir: Workdir):
        """Takes the lock; makes the folder if it is missing.

        Raises:
          OSError: if another process holds the lock; the message says which. Also if the file
            cannot be written.
        """
        self._path = workdir.lock
        storage.make_folder(self._path.parent)
        self._entry: FileEntry | ObjectEntry
        in_bucket = storage.is_bucket(self._path)
        self._entry = ObjectEntry(self._path) if in_bucket else FileEntry(self._path)
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._token, self._beats = secrets.token_hex(8), 0
        self._lost: dict[str, Any] | None = None
        self._ended = threading.Event()
        try:
            self._take()
        except BaseException:
            self._entry.close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost is None:
            self._entry.release()
        self._entry.close()

    def check(self) -> None:
        """Raises OSError if another run has taken the lock.

        It takes the lock only if this process did not write it for a while, for example because the
        process was suspended or the network was down.
        """
        if self._lost is not None:
            raise OSError(
                f"{self._path.parent}: {_who(self._lost)} has taken this folder over, because this "
                "process did not answer. It ends, and the other continues the run"
            )

    def _take(self) -> None:
        """Writes the entry when it is clear that no other run uses the folder."""
        freed = self._entry.lock()
        if freed is False:
            raise self._refusal(self._read())
        start = time.monotonic()
        holder = found = self._read()
        if holder and not (freed and holder.get("host") == socket.gethostname()):
            self._await_end(holder)
            start, found = time.monotonic(), self._read()
            if found and found != holder:
                raise self._refusal(found)
        created = not found and self._create()
        if not created:
            self._write()
        if self._entry.settles:
            slow = not created and time.monotonic() - start > _SETTLE / 2
            time.sleep(_SETTLE + _BEAT if slow else _SETTLE)
            if (found := self._read()) and not self._is_ours(found):
                raise self._refusal(found)

    def _create(self) -> bool:
        """Writes the first entry; returns False if an unreadable one is there."""
        try:
            self._entry.create(self._content())
        except FileExistsError:
            found = self._read()
            if found and not self._is_ours(found):
                raise self._refusal(found) from None
            return bool(found)  # ours if the answer to a first request was lost
        return True

    def _await_end(self, holder: dict[str, Any]) -> None:
        """Waits until it is clear that the holder of an entry has ended."""
        if _has_ended(holder):
            return
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
            found = json.loads(self._entry.read())
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _is_ours(self, found: dict[str, Any]) -> bool:
        return found.get("token") == self._token

    def _write(self) -> None:
        self._entry.write(self._content())

    def _content(self) -> bytes:
        entry = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "kernel": _kernel(),
            "since": self._since,
            "token": self._token,
            "beats": self._beats,
        }
        return json.dumps(entry).encode() + b"\n"

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self._beats += 1
            try:
                found = self._read()
                if found and not self._is_ours(found):
                    self._lost = found
                    return
                self._write()
            except Exception as error:
                # A full disk, or a bucket out of reach, ends the run elsewhere.
                log.debug("%s: %s", self._path, error)


def _has_ended(holder: dict[str, Any]) -> bool:
    """Returns whether a process certainly has ended, because it ran on this host."""
    process = holder.get("process")
    if not _kernel() or holder.get("kernel") != _kernel() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _kernel() -> str:
    """Returns what processes have in common that see each other's numbers; empty if unknown.

    Hosts may have the same name, and containers of a host may number their processes separately.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return (
        f"process {holder.get('process')} on host {holder.get('host')} (since "
        f"{holder.get('since')})"
    )
