"""Worker processes that turn chunks into batches."""

from collections.abc import Generator
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

_SHARED = 2**16  # bytes; larger arrays are sent through shared memory, smaller ones by pipe


def iterate(
    chunks: TrainChunks | EvalChunks,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """Makes batches of chunks, from one step to another.

    Args:
      chunks: the chunks of training (endless) or of an evaluation.
      start_step: number of the first batch to make, from 0.
      stop_step: number of the batch before which to stop; None makes all batches. If the workers
        are stopped earlier, the operating system frees the chunks that they had made ahead.
      workers: number of processes that make chunks; 0 makes them in this process, on demand.

    Yields:
      Batches of `chunks.share.size` images. Close the generator to end the workers.
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
        # Asking for the first batch starts the workers.
        with signals.shielded_children() if workers else contextlib.nullcontext():
            parts = list(itertools.islice(iterator, per_batch))
        while parts:
            yield {key: _join([part[key] for part in parts]) for key in parts[0]}
            parts = list(itertools.islice(iterator, per_batch))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
        if workers:
            # grain's iterators are part of a reference cycle. They hold the last chunk of each
            # worker in shared memory, which would not be freed at the end of the process.
            del iterator, dataset
            gc.collect()


def num_workers(wanted: int | None, source: Source) -> int:
    """Returns the number of worker processes: `wanted`, or by default one a core, 0 for arrays."""
    if wanted is not None:
        return wanted
    return 0 if isinstance(source, ArraySource) else os.cpu_count() or 1


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)  # copies even a single part, which is in worker shared memory
