"""How often, and for how long, a request to a bucket is tried again."""

import asyncio
from collections.abc import Awaitable, Callable
import itertools
import logging
import math
import os
import random
import time
from typing import NamedTuple, TypeVar

from convit_jax.storage.faults import VARIABLE, Fault

log = logging.getLogger(__name__)
T = TypeVar("T")

_DEFAULT_LIMIT = 180.0
_UPLOAD_RATE = 1e6  # bytes a second below which an upload counts as stalled
_BETWEEN_LINES = 30.0  # seconds from one line of the log about retries to the next

_last_line = -_BETWEEN_LINES
# Bucket -> when a request to it was given up for lack of time, until one succeeds. The end of a run
# makes several requests, and none of them waits for the whole limit again.
_given_up: dict[str, float] = {}


class Patience(NamedTuple):
    """Times in seconds.

    Attributes:
      limit: from the first request to the last one that is begun.
      silence: after which a request without any answer is given up.
      first_wait: between the first request and the second. Each later wait is twice as long.
      longest_wait: between two requests.
    """

    limit: float
    silence: float
    first_wait: float
    longest_wait: float

    def tries(self) -> int:
        """Returns about how many requests are made within the limit if each fails at once."""
        growing = max(0, math.ceil(math.log2(self.longest_wait / self.first_wait)))
        spent = self.first_wait * (2**growing - 1)
        return 1 + growing + max(0, int((self.limit - spent) / self.longest_wait))


def patience() -> Patience:
    """Returns the times that follow from the environment variable `VARIABLE`.

    Raises:
      ValueError: if the variable is not a positive number.
    """
    text = os.environ.get(VARIABLE)
    try:
        limit = float(text) if text else _DEFAULT_LIMIT
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(f"${VARIABLE}: expected a number of seconds above 0, got {text!r}")
    return Patience(limit, min(30, limit / 6), min(1, limit / 180), min(30, limit / 6))


async def attempt(
    request: Callable[[int], Awaitable[T]],
    fault_of: Callable[[Exception], Fault | None],
    give_up: Callable[[Fault, int, float], Exception],
    *,
    name: str,
    upload: int = 0,
) -> T:
    """Makes a request until it succeeds, with growing waits, or until patience ends.

    A request that follows one that was given up for lack of time is made once, unless another one
    to the same bucket has succeeded since, or the limit has passed.

    Args:
      request: makes the request; takes the number of the try, from 1.
      fault_of: returns the fault that an exception stands for; None passes the exception on.
      give_up: returns the exception to raise, from the last fault, the number of tries and the
        seconds that they took.
      name: URL of the object, for the log.
      upload: bytes that the request sends.
    """
    times = patience()
    start = time.monotonic()
    bucket = "/".join(name.split("/", 3)[:3])
    only_once = start - _given_up.get(bucket, -math.inf) < times.limit
    for tries in itertools.count(1):
        try:
            # The time-outs of HTTP clients begin when a request has been sent.
            async with asyncio.timeout(times.silence + upload / _UPLOAD_RATE if upload else None):
                answer = await request(tries)
            _given_up.pop(bucket, None)
            return answer
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            wait = min(times.first_wait * 2 ** (tries - 1), times.longest_wait)
            wait *= random.uniform(0.75, 1.25)  # so that the hosts of a pod do not come at once
            seconds = time.monotonic() - start
            out_of_tries = fault.most_tries is not None and tries >= fault.most_tries
            out_of_time = seconds + wait > times.limit
            if out_of_time and fault.most_tries is None:
                _given_up[bucket] = time.monotonic()
            if out_of_tries or out_of_time or (only_once and fault.most_tries is None):
                raise give_up(fault, tries, seconds) from error
        if seconds + wait > times.limit / 20:
            _say(f"{name}: {fault.reason}; trying again, for {times.limit:.0f} s at most")
        await asyncio.sleep(wait)
    raise AssertionError("the loop has no end")


def _say(line: str) -> None:
    """Logs a warning, unless another one was logged shortly before."""
    global _last_line
    if time.monotonic() - _last_line >= _BETWEEN_LINES:
        _last_line = time.monotonic()
        log.warning(line)
