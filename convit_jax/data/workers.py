"""Worker processes that turn chunks into batches."""

from collections.abc import Iterator
import contextlib
import gc
import itertools
import os

import grain
import numpy as np

from convit_jax.data.arrays import ArraySource
from convit_jax.data.chunks import Batch, EvalChunks, TrainChunks
from convit_jax.data.source import Source
from convit_jax.parallel import signals

_SHARED = 2**16  # bytes from which an array goes through shared memory; a pipe is cheaper below


def iterate(
    chunks: TrainChunks | EvalChunks,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of chunks, from a step on and up to another.

    Args:
      chunks: of training (endless) or evaluation.
      start_step: the number of batches that were already seen.
      stop_step: the number of batches at the end; None is the end of the chunks. (Workers
        that are stopped before it leave what they had made ahead to the operating system.)
      workers: processes that make chunks; 0 makes them here, when they are asked for.

    Yields:
      Batches of the share's size; close the generator to end the workers.
    """
    per_batch = chunks.share.chunks
    stop = len(chunks) if stop_step is None else stop_step * per_batch
    dataset = grain.MapDataset.source(chunks)[start_step * per_batch : stop]
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        small = grain.experimental.DatasetOptions(min_shm_size=_SHARED)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, small)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, signals.end_with_parent)
    iterator = iter(dataset)
    try:
        # The first batch starts the workers.
        with signals.shielded_children() if workers else contextlib.nullcontext():
            parts = list(itertools.islice(iterator, per_batch))
        while parts:
            yield {key: _join([part[key] for part in parts]) for key in parts[0]}
            parts = list(itertools.islice(iterator, per_batch))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
        if workers:
            # grain's iterators lie in a reference cycle and hold the last chunk of each worker,
            # and with it shared memory, which nothing would give back at the end of the process.
            del iterator, dataset
            gc.collect()


def num_workers(wanted: int | None, source: Source) -> int:
    """Processes that make batches: as many as wanted; by default one a core, none for arrays."""
    if wanted is not None:
        return wanted
    return 0 if isinstance(source, ArraySource) else os.cpu_count() or 1


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)  # a copy even of one part: it lies in a worker's shared memory
