"""Worker processes that make chunks, and the memory in which they hand over the images.

Chunk number i is made by worker i % count, so the order does not depend on speed. The images of a
chunk are written to memory that a worker and this process share, in one of a few slots. It is
anonymous memory and not a file in /dev/shm, which a container may limit to 64 MB.

grain's own process prefetch is not used. It needs room in /dev/shm, and a run whose worker was
killed once hung for 20 minutes instead of ending (grain 0.2.18).
"""

import atexit
from collections.abc import Generator, Iterator
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

from convit_jax.data.batches.chunks import Batch, EvalChunks, TrainChunks
from convit_jax.parallel import signals

Chunks = TrainChunks | EvalChunks

# Images that a worker may have made ahead, beside the chunk that it works on. As many are on their
# way from a bucket.
_AHEAD = 128
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
    count = min(workers, len(numbers))
    team: list[_Worker] = []
    try:
        try:
            with _File() as file, signals.shielded_children():
                # All workers read this file. As an argument, each would keep a copy of its own, and
                # the chunks may hold the names of a million images.
                with open(file.descriptor, "wb", closefd=False) as out:
                    pickle.dump(chunks, out)
                for i in range(count):
                    team.append(_Worker(file, numbers[i::count], slots))
                    team[-1].start()
        except OSError as error:  # of the limits of processes, open files and memory
            raise WorkerError(
                f"the {count} worker processes that make batches cannot be started: {error}. Use "
                f"fewer (data.workers), or raise the limit; `ulimit -a` lists the limits"
            ) from error
        for i in range(len(numbers)):
            yield from team[i % count].next()
    finally:
        for worker in team:
            worker.end()


class _Worker:
    """A worker process, as this process sees it."""

    def __init__(self, file: "_File", numbers: range, slots: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._made, made = context.Pipe(duplex=False)
        free, self._free = context.Pipe(duplex=False)
        self._memory = _Memory(slots)
        self._theirs = (made, free)
        args = (file, numbers, made, free, self._memory)
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
        mend = "start the same command again"
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
            return f"{what}, probably because memory or a disk was full. {fewer}"
        if name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
            return f"{what}: a library crashed, probably while it decoded an image; {mend}"
        return f"{what}, which another program sent; {mend}"


class _File:
    """An open file without a name, in memory on Linux, which a process gets when it is started."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _anonymous_file() if descriptor is None else descriptor

    def __reduce__(self) -> tuple:
        return _reopen, (reduction.DupFd(self.descriptor),)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a sandbox may not have it
            return os.memfd_create("chunks")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _reopen(handle: Any) -> _File:
    return _File(handle.detach())


class _Memory:
    """Memory that two processes share, in slots of equal size for the images of one chunk."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._file = _File()
        self._map: mmap.mmap | None = None

    def slot(self, number: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Returns the array in a slot; all arrays must have as many bytes as the first."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._map is None:
            if os.fstat(self._file.descriptor).st_size == 0:
                os.ftruncate(self._file.descriptor, self.slots * size)
            self._map = mmap.mmap(self._file.descriptor, self.slots * size)
        return np.ndarray(shape, dtype, self._map, offset=number * size)

    def close(self) -> None:
        self._file.close()
        self._map = None


def _work(file: _File, numbers: range, made: Connection, free: Connection, memory: _Memory) -> None:
    """Runs a worker process: makes chunks until all are made, one fails, or the parent ends."""
    signals.end_with_parent()
    unused = list(range(memory.slots))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        for result in _results(file, numbers):
            if isinstance(result, Exception):
                made.send(result)
            else:
                image = result.pop("image")
                slot = unused.pop() if unused else free.recv()
                memory.slot(slot, image.shape, image.dtype.str)[...] = image
                made.send((slot, image.shape, image.dtype.str, result))


def _results(file: _File, numbers: range) -> Iterator[Batch | Exception]:
    """Yields the chunks of these numbers; if one fails, yields its error and ends."""
    try:
        # Mapped, because all workers share the file's position.
        with file, mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ) as pickled:
            chunks = pickle.loads(pickled)
        size = None
        early = max(1, _AHEAD // chunks.share.chunk)
        for number in numbers[:early]:
            chunks.request(number)
        for place, number in enumerate(numbers):
            for later in numbers[place + early : place + early + 1]:
                chunks.request(later)
            chunk = chunks[number]
            image = chunk["image"]
            if size is not None and image.nbytes != size:
                raise ValueError(f"images of a chunk: expected {size} bytes, got {image.shape}")
            size = image.nbytes
            yield chunk
    except Exception as error:
        yield _portable(error)


def _portable(error: Exception) -> Exception:
    """Returns the error with its traceback as a note, or another one if it cannot be sent."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code
        return RuntimeError(f"in a worker process:\n{text}")
    return error
