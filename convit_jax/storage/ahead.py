"""Reads objects of buckets, and parts of them, many at a time.

A bucket answers a request after some 30 ms, however little is asked for. So what will be needed
soon is requested early, and all requests wait together.
"""

from collections.abc import Iterable
from concurrent.futures import Future
import threading
from typing import NamedTuple

from convit_jax.storage.calls import begin, result

_MERGED = 2**20  # bytes; spans that adjoin are requested together, up to so many


class Span(NamedTuple):
    """Some bytes of an object in a bucket; all of them if `end` is None.

    Attributes:
      path: gs://BUCKET/NAME or s3://BUCKET/NAME.
      start: offset of the first byte.
      end: offset after the last byte.
    """

    path: str
    start: int = 0
    end: int | None = None


class ReadAhead:
    """Reads spans of objects. Those that were requested before are on their way already.

    Every request of a span is meant for one call of `read`. A pickled copy has requested nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested: dict[Span, _Requested] = {}

    def __reduce__(self) -> tuple:
        return ReadAhead, ()

    def request(self, spans: Iterable[Span]) -> None:
        """Begins to read spans in the background."""
        with self._lock:
            new: list[Span] = []
            for span in spans:
                if span in self._requested:
                    self._requested[span].reads += 1
                else:
                    new.append(span)
                    self._requested[span] = _Requested()
            for run in _runs(new):
                answer = _begin(Span(run[0].path, run[0].start, run[-1].end))
                for span in run:
                    self._requested[span].answer = answer
                    self._requested[span].skip = span.start - run[0].start

    def read(self, span: Span) -> bytes:
        """Returns the bytes of a span; fewer if the object ends within it.

        Raises:
          FileNotFoundError: if there is no such object.
          OSError: if it cannot be read; the message names it.
        """
        with self._lock:
            found = self._requested.get(span)
            if found is not None:
                found.reads -= 1
                if not found.reads:
                    del self._requested[span]
        if found is None:
            return result(_begin(span), span.path)
        data = result(found.answer, span.path)
        if span.end is None:
            return data
        return data[found.skip : found.skip + span.end - span.start]


class _Requested:
    """A span that was requested: by which request, and where in its answer the span begins."""

    answer: Future[bytes]

    def __init__(self) -> None:
        self.reads = 1
        self.skip = 0


def _runs(spans: Iterable[Span]) -> list[list[Span]]:
    """Groups neighbours in a list whose bytes adjoin, up to `_MERGED` bytes."""
    runs: list[list[Span]] = []
    for span in spans:
        if runs and span.end is not None:
            first, last = runs[-1][0], runs[-1][-1]
            adjoins = (last.path, last.end) == (span.path, span.start)
            if adjoins and span.end - first.start <= _MERGED:
                runs[-1].append(span)
                continue
        runs.append([span])
    return runs


def _begin(span: Span) -> Future[bytes]:
    """Requests a span; the answer arrives in the background."""
    if span.end is None:
        # s3fs asks for the size first, unless it may make only one request at a time.
        return begin(span.path, "_cat_file", max_concurrency=1)
    return begin(span.path, "_cat_file", start=span.start, end=span.end)
