"""Worker processes: killed or crashing, and without room in /dev/shm."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT

from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches import worker_processes
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate


def chunks(transform) -> TrainChunks:
    images = np.zeros((8, 2, 2, 1), np.uint8)
    names = np.array([b"image"] * 8)
    source = ArraySource(images, np.zeros(8, np.int32), ("a",), names)
    return TrainChunks(source, transform, Share(4), seed=0)


def keep(image, rng):
    return image


def test_a_killed_worker_is_one_error_that_says_the_way_out():
    with contextlib.closing(iterate(chunks(keep), workers=1)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(worker_processes.WorkerError) as caught:
            list(itertools.islice(batches, 100))
    assert str(caught.value) == (
        "a worker process that makes batches was ended by SIGKILL, probably because the memory of "
        "the machine or job ran out. Use fewer workers (data.workers) or give the run more memory; "
        "start the same command again"
    )
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("status", "texts"),
    [
        (-signal.SIGBUS, ("SIGBUS", "/dev/shm was full", "data.workers")),
        (-signal.SIGSEGV, ("SIGSEGV: a library crashed",)),
        (-signal.SIGTERM, ("SIGTERM, which another program sent",)),
        (-77, ("signal 77",)),
        (1, ("ended with status 1. Its own message is above", "data.workers=0")),
    ],
)
def test_the_cause_of_death_is_named(status, texts):
    said = worker_processes.cause_of_death(status)
    assert all(text in said for text in texts), said


SCRIPT = """
import contextlib, os
from convit_jax.data.batches import worker_processes
from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate, num_workers
import numpy as np

def large(image, rng):
    return np.full((224, 224, 3), image[0, 0, 0])

if __name__ == "__main__":
    images, names = np.zeros((128, 2, 2, 1), np.uint8), np.array([b"image"] * 128)
    source = ArraySource(images, np.zeros(128, np.int32), ("a",), names)
    chunks = TrainChunks(source, large, Share(32), seed=0)
    files = object()  # anything but images in memory
    workers = num_workers(None, files, 32 * 224 * 224 * 3, teams=2)
    print("workers", workers, "of", os.cpu_count())
    with contextlib.closing(iterate(chunks, workers=workers)) as batches:
        print([next(batches)["image"].shape for _ in range(8)])
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
@pytest.mark.parametrize(("size", "expected"), [("48m", "workers 1"), ("8m", "workers 0")])
def test_a_small_dev_shm_limits_the_workers(tmp_path, size, expected):
    script = tmp_path / "feed.py"
    script.write_text(SCRIPT)
    prefix = ("unshare", "-rm", "bash", "-c")
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    allowed = subprocess.run((*prefix, mount), capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"needs user namespaces: {allowed.stderr}")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")
    done = subprocess.run(
        (*prefix, f'{mount} && exec "$@"', "-", sys.executable, script),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout.startswith(expected), done.stderr
    assert done.stdout.endswith(f"{[(32, 224, 224, 3)] * 8}\n"), done.stderr
    assert f"/dev/shm has {50 if size == '48m' else 8} MB free" in done.stderr
