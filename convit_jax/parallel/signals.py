"""Handles SIGTERM and SIGINT (Ctrl-C): all processes of a run stop after the same step.

Worker processes that make batches are shielded from these signals, which a terminal and Slurm send
to them too. They must not end before their parent has stopped, and they must end with it.
"""

from collections.abc import Iterator
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_WISH = 1.0  # seconds; a repeat within them is ignored, as `timeout` and others send two


class Interruption:
    """Context manager in which SIGTERM and SIGINT make `requested` return True.

    The first signal is logged. A second one, at least a second later, acts as it would outside the
    block: SIGINT raises KeyboardInterrupt and SIGTERM ends the process.

    With several processes, a signal to one of them stops all, through JAX's preemption service. The
    service handles SIGTERM, also every later one, because schedulers repeat it. SIGINT is passed on
    to the service as SIGTERM.

    Enter the block on the main thread, the only one on which Python can set signal handlers.
    """

    # Shared by all blocks of the process, because the service expects one sequence of calls.
    _calls = itertools.count()

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._requested = False
        self._first: float | None = None  # time of the first signal, seconds
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Keep the service's handler of SIGTERM: it is written in C++, so Python cannot restore it.
        for number in (signal.SIGINT,) if self._several else _SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Returns whether to stop now.

        Every process must call it equally often, once a step. All processes get the same answer at
        the same call. Once True, the answer stays True. A call takes microseconds and does not wait
        for the devices.
        """
        if self._several and not self._requested:
            self._requested = multihost_utils.reached_preemption_sync_point(next(self._calls))
            if self._requested:
                log.info("stopping after this step: one of the processes got SIGTERM or SIGINT")
        return self._requested

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            name = signal.Signals(number).name
            log.warning("%s: stopping after this step; send it again to stop at once", name)
            if self._several:
                signal.raise_signal(signal.SIGTERM)
            else:
                self._requested = True
        elif now - self._first >= _SAME_WISH:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            # None stands for a handler that was not set from Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}


@contextlib.contextmanager
def shielded_children() -> Iterator[None]:
    """Context manager: processes started inside, also by new threads, get no SIGINT or SIGTERM.

    The new processes inherit the mask of blocked signals when they start. They can be ended by
    SIGKILL, or by means other than signals. This process still gets its signals, on another thread
    or at the end of the block.
    """
    # Start multiprocessing's resource tracker first, because starting it unblocks the signals.
    multiprocessing.get_context("spawn").Lock()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker: int, count: int) -> None:
    """Makes a worker process end when its parent ends, even if by SIGKILL. Call it first there.

    Without it, grain's workers outlive their parent and keep their memory. grain passes the
    arguments, which are not used.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
