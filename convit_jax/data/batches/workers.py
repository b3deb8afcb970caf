"""Makes batches ahead of the training step, in worker processes or in threads."""

from collections import deque
from collections.abc import Generator, Iterator
import concurrent.futures
import itertools
import logging
import math

import numpy as np

from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches import worker_processes
from convit_jax.data.batches.chunks import Batch, EvalChunks, Share, TrainChunks
from convit_jax.data.source import Source, Subset
from convit_jax.parallel import cpus, processes

log = logging.getLogger(__name__)

_AHEAD = 2  # batches that threads make ahead
_FEW = 2048  # images; an evaluation of at most as many is done before processes would have started
_THREADS = 8  # most threads for an evaluation of a few images
_SMALL = 16  # images; smaller chunks get a log line
_UNIT = 64  # images; a share of a batch that is a multiple of this divides into large chunks


def iterate(
    chunks: TrainChunks | EvalChunks,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """Makes batches of chunks, from one step to another, ahead of their use.

    Args:
      chunks: the chunks of training (endless) or of an evaluation.
      start_step: number of the first batch to make, from 0.
      stop_step: number of the batch before which to stop; None makes all batches.
      workers: number of processes that make chunks; 0 makes them in a thread of this process. An
        evaluation of few images uses threads in any case, because processes take seconds to start.

    Yields:
      Batches of `chunks.share.size` images. Close the generator to end the workers.

    Raises:
      WorkerError: if a worker process is killed or crashes.
      CorruptImageError: if an image cannot be decoded.
    """
    share = chunks.share
    stop = len(chunks) if stop_step is None else stop_step * share.chunks
    numbers = range(start_step * share.chunks, stop)
    if not workers:
        parts = _in_threads(chunks, numbers, 1)
    elif isinstance(chunks, EvalChunks) and len(numbers) * share.chunk <= _FEW:
        parts = _in_threads(chunks, numbers, min(workers, _THREADS))
    else:
        parts = worker_processes.make(chunks, numbers, workers)
    try:
        while batch := _batch(parts, share):
            yield batch
    finally:
        parts.close()


def num_workers(wanted: int | None, source: Source) -> int:
    """Returns the number of worker processes; every process of a run must call it.

    Args:
      wanted: the number to use; None means one for each CPU that this process may use, divided by
        the number of processes that share these CPUs, and 0 for images in memory.
      source: the images.
    """
    sharing = processes.on_this_host()
    while isinstance(source, Subset):
        source = source.source
    if wanted is not None:
        return wanted
    return 0 if isinstance(source, ArraySource) else max(1, cpus.available() // sharing)


def warn_of_small_chunks(share: Share, multiple: int) -> None:
    """Logs a better batch size if a process's share of a batch divides only into small chunks.

    Args:
      share: the part of every global batch that this process reads.
      multiple: a batch size must be a multiple of this number.
    """
    if share.chunk >= min(_SMALL, share.size):
        return
    unit = math.lcm(_UNIT * share.count, multiple)
    better = unit * max(1, round(share.batch_size / unit))
    log.info(
        "train.batch_size=%d: each process reads %d images of a batch, which divide only into "
        "chunks of %d, and small chunks cost time; %d makes chunks of %d",
        share.batch_size,
        share.size,
        share.chunk,
        better,
        Share(better, share.index, share.count).chunk,
    )


def _in_threads(
    chunks: TrainChunks | EvalChunks, numbers: range, threads: int
) -> Generator[Batch, None, None]:
    """Yields the chunks of these numbers, in order, made in threads of this process."""
    waiting: deque[concurrent.futures.Future[Batch]] = deque()
    ahead = max(_AHEAD * chunks.share.chunks, threads)
    with concurrent.futures.ThreadPoolExecutor(threads, "batches") as pool:
        try:
            for number in numbers:
                chunks.request(number)
                waiting.append(pool.submit(chunks.__getitem__, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batch(parts: Iterator[Batch], share: Share) -> Batch:
    """Copies the next chunks into one batch; returns an empty one after the last."""
    batch: Batch = {}
    for number, part in enumerate(itertools.islice(parts, share.chunks)):
        for key, values in part.items():
            if not number:
                batch[key] = np.empty((share.size, *values.shape[1:]), values.dtype)
            batch[key][number * share.chunk : (number + 1) * share.chunk] = values
    return batch
