"""Makes chunks in grain's worker processes, and says why a worker ended."""

from collections.abc import Generator
import gc
import os
import re
import signal
import sys

from absl import flags
import grain

from convit_jax.data.batches.chunks import Batch, EvalChunks, TrainChunks
from convit_jax.parallel import signals

_SHARED = 2**16  # bytes; larger arrays are sent through shared memory, smaller ones by pipe
_BUFFER = 2  # chunks that a worker may have ready
HELD = _BUFFER + 2  # chunks of a worker in shared memory: also the next one, and the one in use
SHM = "/dev/shm"  # where Linux has shared memory


class WorkerError(OSError):
    """Raised if a worker process ends before its work is done."""


def make(
    chunks: TrainChunks | EvalChunks, numbers: range, workers: int
) -> Generator[Batch, None, None]:
    """Makes chunks in worker processes.

    Args:
      chunks: the chunks to choose from; a copy is sent to every worker.
      numbers: numbers of the chunks to make, one after the other.
      workers: number of processes, at least 1.

    Yields:
      The chunks in order. Close the generator to end the workers.

    Raises:
      WorkerError: if a worker is killed or crashes.
      Exception: any error that a worker raises while it makes a chunk.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain passes absl's flags to its workers
    dataset = grain.MapDataset.source(chunks)[numbers.start : numbers.stop]
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = grain.experimental.WithOptionsIterDataset(
        dataset, grain.experimental.DatasetOptions(min_shm_size=_SHARED)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFER)
    iterator = iter(dataset.mp_prefetch(options, _start))
    try:
        with signals.shielded_children():
            chunk = next(iterator, None)  # starts the workers
        while chunk is not None:
            yield chunk
            chunk = next(iterator, None)
    except RuntimeError as error:
        status = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if status is None:
            raise
        raise WorkerError(cause_of_death(int(status[1]))) from None
    finally:
        iterator.close()
        # grain's iterators are part of a reference cycle. They hold the last chunk of each worker
        # in shared memory, which would not be freed at the end of the process.
        chunk = iterator = dataset = None
        gc.collect()


def _start(worker: int, count: int) -> None:
    """Begins a worker process; grain passes its number and the number of workers."""
    signals.end_with_parent()


def room() -> int | None:
    """Returns the free bytes of the memory through which workers send; None if it has no limit.

    Docker gives a container 64 MB, unless --shm-size says otherwise.
    """
    if sys.platform != "linux":
        return None
    try:
        system = os.statvfs(SHM)
    except OSError:
        return 0
    return system.f_bavail * system.f_frsize


def cause_of_death(status: int) -> str:
    """Returns the probable cause of the end of a worker, and the way out.

    Args:
      status: exit status of the process; minus the number of a signal that ended it.
    """
    mend = "start the same command again"
    fewer = f"Use fewer workers (data.workers) or give the run more memory; {mend}"
    if status >= 0:
        return (
            f"a worker process that makes batches ended with status {status}. Its own message is "
            f"above; data.workers=0 makes batches without worker processes"
        )
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    what = f"a worker process that makes batches was ended by {name}"
    if name == "SIGKILL":
        return f"{what}, probably because the memory of the machine or job ran out. {fewer}"
    if name == "SIGBUS":
        return (
            f"{what}, probably because {SHM} was full. Use fewer workers (data.workers) or a "
            f"larger --shm-size of Docker; {mend}"
        )
    if name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
        return f"{what}: a library crashed, probably while it decoded an image; {mend}"
    return f"{what}, which another program sent; {mend}"
