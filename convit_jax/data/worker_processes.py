"""Worker processes that make chunks, and the memory in which they hand over the images.

Chunk number i is made by worker i % count, so the order does not depend on speed. The images of a
chunk are written to memory that a worker and this process share, in one of a few slots. It is
anonymous memory and not a file in /dev/shm, which a container may limit to 64 MB.
"""

import atexit
from collections.abc import Generator
import concurrent.futures
import contextlib
import math
import mmap
import multiprocessing
from multiprocessing import reduction
from multiprocessing.connection import Connection
import os
import pickle
import signal
import tempfile
import traceback
from typing import Any

import numpy as np

from convit_jax.data.chunks import Batch, EvalChunks, TrainChunks
from convit_jax.parallel import signals

Chunks = TrainChunks | EvalChunks

_AHEAD = 128  # images that a worker may have made ahead, beside the chunk that it works on
_STARTS = 16  # workers that are started at a time
_PATIENCE = 5.0  # seconds to wait for the exit status of a worker whose pipe has closed


class WorkerError(OSError):
    """Raised if a worker process ends before its work is done."""


def make(chunks: Chunks, numbers: range, workers: int) -> Generator[Batch, None, None]:
    """Makes chunks in worker processes.

    Args:
      chunks: the chunks to choose from; a copy is sent to every worker.
      numbers: numbers of the chunks to make.
      workers: number of processes, at least 1.

    Yields:
      The chunks in order. The images of a chunk may be overwritten once the next one is asked for.
      Close the generator to end the workers.

    Raises:
      WorkerError: if a worker is killed or crashes.
      Exception: any error that a worker raises while it makes a chunk.
    """
    if not numbers:
        return
    slots = max(2, math.ceil(_AHEAD / chunks.share.chunk))
    pickled = pickle.dumps(chunks)
    count = min(workers, len(numbers))
    team: list[_Worker] = []
    try:
        team.extend(_Worker(pickled, numbers[i::count], slots) for i in range(count))
        # A start returns only after the new process has read its arguments, so start many at once.
        with (
            signals.shielded_children(),
            concurrent.futures.ThreadPoolExecutor(min(count, _STARTS)) as pool,
        ):
            list(pool.map(_Worker.start, team))
        for i in range(len(numbers)):
            yield from team[i % count].next()
    finally:
        for worker in team:
            worker.end()


class _Worker:
    """A worker process, as this process sees it."""

    def __init__(self, pickled: bytes, numbers: range, slots: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._made, made = context.Pipe(duplex=False)
        free, self._free = context.Pipe(duplex=False)
        self._memory = _Memory(slots)
        self._theirs = (made, free)
        args = (pickled, numbers, made, free, self._memory)
        self._process = context.Process(target=_work, args=args, daemon=True)

    def start(self) -> None:
        # Workers ignore SIGTERM, by which multiprocessing would end them when Python exits.
        atexit.register(self.end)
        self._process.start()
        for connection in self._theirs:
            connection.close()  # so that the end of the worker closes its pipes

    def next(self) -> Generator[Batch, None, None]:
        """Yields the next chunk, and then tells the worker that its slot is free."""
        try:
            message = self._made.recv()
        except (EOFError, OSError):
            raise WorkerError(self._cause_of_death()) from None
        if isinstance(message, Exception):
            raise message
        slot, shape, dtype, chunk = message
        image = self._memory.slot(slot, shape, dtype)
        yield {"image": image, **chunk}
        with contextlib.suppress(BrokenPipeError):  # the worker has made its last chunk
            self._free.send(slot)

    def end(self) -> None:
        """Ends the worker at once; it holds nothing that would have to be put in order."""
        atexit.unregister(self.end)
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        for connection in (self._made, self._free, *self._theirs):
            connection.close()
        self._memory.close()

    def _cause_of_death(self) -> str:
        self._process.join(_PATIENCE)
        status = self._process.exitcode
        mend = "the same command continues the run"
        fewer = f"Use fewer workers (data.workers) or give the run more memory; {mend}"
        if status is None or status >= 0:
            return (
                f"a worker process that makes batches ended with status {status}. Its own message "
                f"is above; data.workers=0 makes batches without worker processes"
            )
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        what = f"a worker process that makes batches was ended by {name}"
        if name == "SIGKILL":
            return f"{what}, probably because the memory of the machine or job ran out. {fewer}"
        if name == "SIGBUS":
            return f"{what}, probably because memory, /dev/shm or a disk was full. {fewer}"
        if name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
            return f"{what}: a library crashed, probably while it decoded an image; {mend}"
        return f"{what}, which another program sent; {mend}"


class _Memory:
    """Memory that two processes share, in slots of equal size for the images of one chunk."""

    def __init__(self, slots: int, file: int | None = None) -> None:
        self._slots = slots
        self._file = _anonymous_file() if file is None else file
        self._map: mmap.mmap | None = None

    def __reduce__(self) -> tuple:
        # Passes the open file to a process that is being started.
        return _reopen, (self._slots, reduction.DupFd(self._file))

    def slot(self, number: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Returns the array in a slot; all arrays must have as many bytes as the first."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._map is None:
            if os.fstat(self._file).st_size == 0:
                os.ftruncate(self._file, max(1, self._slots * size))
            self._map = mmap.mmap(self._file, max(1, self._slots * size))
        return np.ndarray(shape, dtype, self._map, offset=number * size)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self._map = -1, None


def _anonymous_file() -> int:
    """Opens a new file that has no name: in memory on Linux, elsewhere in the temporary folder."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a sandbox may not have it
            return os.memfd_create("chunks")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _reopen(slots: int, handle: Any) -> _Memory:
    return _Memory(slots, handle.detach())


def _work(
    pickled: bytes, numbers: range, made: Connection, free: Connection, memory: _Memory
) -> None:
    """Runs a worker process: makes chunks until all are made, one fails, or the parent ends."""
    signals.end_with_parent()
    unused, size = list(range(memory._slots)), None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        try:
            chunks = pickle.loads(pickled)
            for number in numbers:
                chunk = chunks[number]
                image = chunk.pop("image")
                if size is not None and image.nbytes != size:
                    raise ValueError(f"images of a chunk: expected {size} bytes, got {image.shape}")
                size = image.nbytes
                slot = unused.pop() if unused else free.recv()
                memory.slot(slot, image.shape, image.dtype.str)[...] = image
                made.send((slot, image.shape, image.dtype.str, chunk))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            made.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """Returns the error with its traceback as a note, or another one if it cannot be sent."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code
        return RuntimeError(f"in a worker process:\n{text}")
    return error
