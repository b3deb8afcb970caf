"""Runs several processes as one: they find each other, compare their devices, and end together."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import functools
import logging
import os
import pathlib
import platform
import secrets
import signal
import sys
import threading
import time
import traceback
from typing import TypeVar
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from convit_jax import storage
from convit_jax.parallel import launcher

log = logging.getLogger(__name__)

T = TypeVar("T")

_LINGER = 3.0  # seconds that a failing process 0 waits, so that the others can report first
_PATIENCE = 10.0  # seconds to wait until a network file system shows a new file

_launch: launcher.Launch | None = None  # how this process was started, if it is one of several


class RemoteError(RuntimeError):
    """Raised if another process of the run failed."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    heartbeat_timeout: int = 60,
) -> None:
    """Connects the processes of a run, if it has several. Call it before JAX uses a device.

    The first three arguments describe the processes. Without them the processes are found through
    Slurm, Open MPI, torchrun, other launchers of MPI, or the metadata of a Cloud TPU. If there is
    none of these, or only one process, nothing is done.

    If a process dies later, JAX ends the others and says which one died: at once if it was process
    0, else within `heartbeat_timeout` seconds.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.
      timeout: seconds to wait for all processes. After that, this process ends with a message and
        exit status 1.
      heartbeat_timeout: seconds after which a silent process counts as dead.

    Raises:
      ValueError: if an argument is missing or not valid.
      OSError: if process 0 cannot listen at the coordinator's port.
    """
    global _launch
    _launch = launch = launcher.detect(os.environ, coordinator, num_processes, process_id)
    if launch is None:
        return
    # With flags or ranks, JAX must not look for a cluster by itself.
    method = {"flags": "deactivate", "ranks": "deactivate", "tpu": None}.get(launch.by, launch.by)
    with _deadline(timeout):
        try:
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                launch.local_device,
                cluster_detection_method=method,
                initialization_timeout=timeout + 60,  # later than ours: JAX gives no reason
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except jax.errors.JaxRuntimeError as error:
            at = launch.coordinator or "the port that JAX chose"
            raise OSError(f"{_me()} cannot use {at}: {error}. Is the port taken?") from error
    if launch.owns_devices and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI, JAX has restricted the process to one device: undo that.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def disconnect() -> None:
    """Waits for all processes of the run and disconnects them; then each may end on its own.

    A normal exit of Python does the same. An exit status other than 0 needs it before, so that the
    others do not take this process for a failed one. Every process must call it.
    """
    if _launch is not None:
        jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this process is the one that reports and writes."""
    return jax.process_index() == 0


@functools.cache
def on_this_host() -> int:
    """Returns the number of processes of the run that share this host and this process's CPUs.

    Processes that a scheduler has bound to different CPUs of a host do not share them. All
    processes must make the first call together.
    """
    if jax.process_count() == 1:
        return 1
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = zlib.crc32(f"{platform.node()} {bound}".encode()) >> 1  # fits into int32
    return int((_gather(own) == own).sum())


def check_devices() -> None:
    """Checks that all processes have the same devices; each logs its own if there are several.

    Raises:
      RuntimeError: on every process, unless all have equally many devices of the same kind.
    """
    counts = collections.Counter((d.process_index, d.device_kind) for d in jax.devices())
    parts: dict[int, list[str]] = {process: [] for process in range(jax.process_count())}
    for (process, kind), count in sorted(counts.items()):
        parts[process].append(f"{count} x {kind}")
    texts = {process: " and ".join(found) or "none" for process, found in parts.items()}
    if len(set(texts.values())) > 1:
        listed = ", ".join(f"{text} for process {process}" for process, text in texts.items())
        raise RuntimeError(
            f"devices: expected as many of the same kind for every process, got {listed}. Look at "
            "CUDA_VISIBLE_DEVICES, and at JAX's installation on each host"
        )
    if jax.process_count() > 1:
        text = texts[jax.process_index()]
        log.info("%s: %s, %d in all", _number(), text, jax.device_count())


def check_shared_folder(path: str | os.PathLike[str], name: str = "--workdir") -> None:
    """Makes a folder if it is missing, and checks that all processes see the same folder.

    Every process must call it, after `check_devices`.

    Args:
      path: the folder.
      name: name of the option that sets the folder, for messages.

    Raises:
      OSError: on every process, if process 0 cannot write into the folder, or if another process
        does not see the file that process 0 wrote, or cannot look for it.
    """
    folder, token, failure = storage.as_path(path), secrets.randbits(31), None
    try:
        if is_main():
            storage.make_folder(folder)
            storage.write_text(_token_file(folder, token), "")
    except OSError as error:
        failure = error  # raised below, after the other processes have heard of it
    # All processes look for the file with the token of process 0. -1 means that it wrote none.
    token = int(_gather(-1 if failure else token)[0])
    seen, trouble = False, ""
    try:
        seen = token >= 0 and _appears(_token_file(folder, token))
    except OSError as error:
        trouble = f": {error}"  # for all processes: the others wait for this one
    sees = _gather(seen).astype(bool)
    troubles = gather_texts(trouble)
    if is_main() and token >= 0:
        _token_file(folder, token).unlink()
    if token < 0:
        reason = failure or "see its log"
        raise OSError(f"{name}: process 0 cannot write to {folder}: {reason}") from failure
    if not sees.all():
        raise OSError(
            f"{name}: process {', '.join(map(str, np.flatnonzero(~sees)))} does not see the folder "
            f"{folder} of process 0; it must be on a file system that all hosts share, or a bucket"
            f"{next(filter(None, troubles), '')}"
        )


def on_all(function: Callable[[], T]) -> T:
    """Calls a function on every process; if it fails on one of them, fails on all.

    Without it, the other processes would wait for the failed one. Every process must call it, after
    `check_devices`.

    Args:
      function: may raise ValueError or OSError.

    Returns:
      The result of `function` on this process.

    Raises:
      ValueError, OSError: the error of `function` on this process.
      RemoteError: if it failed on other processes only; the message has the first error and the
        number of its process.
    """
    if jax.process_count() == 1:
        return function()
    failure: Exception | None = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = error
    for process, text in enumerate(gather_texts(f"!{failure}" if failure else "")):
        if text and not failure:
            raise RemoteError(f"process {process} stopped: {text[1:]}")
    if failure:
        raise failure
    return result


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, in their order. Every process must call it."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = _gather(len(data))
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def log_from_main() -> None:
    """Makes processes other than 0 log only warnings, with the number of the process in front."""
    if is_main():
        return
    logging.getLogger("convit_jax").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{_number()}: %(message)s"))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends this process at once if an error leaves the block, so that the others end soon too.

    A normal exit of Python would wait minutes for the other processes, and they for this one. In a
    run of one process the error is raised as usual.
    """
    try:
        yield
    except BaseException as error:
        if _launch is None or (isinstance(error, SystemExit) and not error.code):
            raise
        status = _report(error)
        if _launch.process_id in (0, None):
            time.sleep(_LINGER)  # the others abort once process 0 is gone: let them report first
        os._exit(status)


def _report(error: BaseException) -> int:
    """Prints the traceback, as Python would, and a hint; returns the exit status."""
    if isinstance(error, SystemExit):
        text = f"{error.code} ({_me()})\n" if isinstance(error.code, str) else ""
    else:
        text = "".join(traceback.format_exception(error)) + (
            f"error: {_me()} stopped. If another process stopped before, its log says why. Start "
            "all of them again with the same command.\n"
        )
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def _number() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _me() -> str:
    """Returns the text of `_number` without asking JAX, which may not be connected."""
    if _launch is None or _launch.num_processes is None:
        return "this process"
    return f"process {_launch.process_id} of {_launch.num_processes}"


def _gather(value: int) -> np.ndarray:
    """Returns (processes,) int32, the values of all processes."""
    return multihost_utils.process_allgather(np.asarray(value, np.int32)).reshape(-1)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Ends the process with a message if the block takes longer."""

    def end() -> None:
        at = f" at {_launch.coordinator}" if _launch and _launch.coordinator else ""
        is_first = _launch is not None and _launch.process_id == 0
        others = "the others" if is_first else f"process 0{at} and the others"
        sys.stderr.write(
            f"error: {_me()} waited {seconds:g} s for {others}. Check that all of them were "
            "started, each with its own number, that the port is free on the first host, and that "
            f"all hosts reach it{at}.\n"
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # JAX waits in C++, where Python's handler of Ctrl-C would not run.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        timer.cancel()


def _token_file(folder: pathlib.Path, token: int) -> pathlib.Path:
    return folder / f".shared-{token}"


def _appears(path: pathlib.Path) -> bool:
    """Waits for a file; returns whether it has appeared."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
