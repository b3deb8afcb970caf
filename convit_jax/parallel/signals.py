"""SIGTERM and SIGINT (Ctrl-C) as a wish: stop after this step, on every process after the same one.

And what becomes of the processes that make batches: the signals, which a terminal and Slurm send
to them too, must not end them before their parent has stopped, and the parent's end must.
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
_SAME_WISH = 1.0  # seconds: `timeout` and some launchers send a signal twice


class Interruption:
    """Turns SIGTERM and SIGINT into an answer of `requested` while its block runs.

    The first signal says that the process will stop. A second one, a second or more later, acts
    as it would without this block: SIGINT raises KeyboardInterrupt, SIGTERM ends the process.

    With several processes a signal to one of them stops all, by JAX's preemption service. SIGTERM
    is then that service's, and stays so however often it comes (schedulers repeat it); SIGINT is
    passed on to it. Enter it on the main thread, as Python demands of signal handlers.
    """

    # Of the whole process, not of a block: the service knows one sequence of calls.
    _calls = itertools.count()

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._requested = False
        self._first: float | None = None  # time of the first signal, seconds
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python cannot put back the service's handler of SIGTERM, which is C++: leave it in place.
        for number in (signal.SIGINT,) if self._several else _SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether to stop now.

        Every process must call it equally often, once a step, and gets the same answer at the
        same call; once True it stays so. It takes microseconds and does not wait for the devices.
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
            log.warning("%s: stopping after this step; once more to stop at once", name)
            if self._several:
                signal.raise_signal(signal.SIGTERM)
            else:
                self._requested = True
        elif now - self._first >= _SAME_WISH:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            # None: it was not installed from Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}


@contextlib.contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that are started in here, or by threads started in here, get no SIGINT or SIGTERM.

    They inherit the mask of signals, from their first moment on. End them with SIGKILL or by other
    means. This process still gets its signals: on another thread, or at the end of the block.
    """
    # Starts the resource tracker of multiprocessing, which would unblock the signals on its way.
    multiprocessing.get_context("spawn").Lock()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker: int, count: int) -> None:
    """To run first in a worker process: it ends when its parent does, even by SIGKILL.

    (Those of grain live on otherwise, and hold memory.) The arguments are grain's; it uses none.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
