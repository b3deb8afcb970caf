"""Handles the signals that ask a run to stop: all its processes stop after the same step.

They are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), and SIGUSR1 and SIGUSR2, which
schedulers send before the time limit of a job.

Worker processes that make batches are shielded from these signals, which a terminal and Slurm send
to them too. They must not end before their parent has stopped, and they must end with it.
"""

from collections.abc import Iterator
import contextlib
import itertools
import logging
import multiprocessing
from multiprocessing import resource_tracker
import os
import signal
import threading
import time
from typing import Any

import numpy as np

# Functions below import jax late, since worker processes do without it.

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SAME_WISH = 1.0  # seconds; a repeat within them is ignored, as `timeout` and others send two


class Interruption:
    """Context manager in which the signals above make `requested` return True.

    The first signal is logged. A second one, at least a second later, acts as it would outside the
    block: SIGINT raises KeyboardInterrupt and the others end the process. A signal that is ignored
    outside the block stays ignored; `nohup` ignores SIGHUP.

    With several processes, a signal to one of them stops all, through JAX's preemption service. The
    service handles SIGTERM, also every later one, because schedulers repeat it. The other signals
    are passed on to the service as SIGTERM.

    Enter the block on the main thread, the only one on which Python can set signal handlers.
    """

    # Shared by all blocks of the process, because the service expects one sequence of calls.
    _calls = itertools.count()

    def __init__(self) -> None:
        import jax

        self._several = jax.process_count() > 1
        self._requested = False
        self._first: float | None = None  # time of the first signal, seconds
        self._number = 0  # the first signal, if this process handled it
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Keep the service's handler of SIGTERM: it is written in C++, so Python cannot restore it.
        for number in SIGNALS[1:] if self._several else SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
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
            from jax.experimental import multihost_utils

            self._requested = multihost_utils.reached_preemption_sync_point(next(self._calls))
            if self._requested:
                log.info("stopping after this step: %s", self._reason())
        return self._requested

    def _reason(self) -> str:
        """Returns which process got which signal. All processes must call it together."""
        from jax.experimental import multihost_utils

        numbers = multihost_utils.process_allgather(np.asarray(self._number, np.int32))
        for process, number in enumerate(numbers):
            if number:
                return f"process {process} got {signal.Signals(number).name}"
        return "one of the processes got SIGTERM"  # the service does not say which

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._number = number
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
    """Context manager: processes started inside, also by new threads, get none of the signals.

    The new processes inherit the mask of blocked signals when they start. They can be ended by
    SIGKILL, or by means other than signals. This process still gets its signals, on another thread
    or at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Starting the first process would start multiprocessing's resource tracker, which unblocks
        # signals. Start it now, shielded too, and block them again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Makes a worker process end when its parent ends, even if by SIGKILL. Call it first there."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
