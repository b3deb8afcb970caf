"""Worker processes: killed, crashing, failing, and without room in /dev/shm."""

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


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def fail(image, rng):
    raise Unsendable("odd", "even")


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


def end_early(image, rng):
    raise EOFError("the file ends early")  # as the end of a pipe is reported


@pytest.mark.parametrize(
    ("transform", "kind", "text"),
    [
        (fail, RuntimeError, r"in a worker process:(.|\n)*Unsendable: odd"),
        (end_early, EOFError, "the file ends early"),
    ],
)
def test_an_error_in_a_worker_reaches_the_caller(transform, kind, text):
    batches = iterate(chunks(transform), workers=1)
    with pytest.raises(kind, match=text):
        next(batches)
    assert multiprocessing.active_children() == []


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", refuse)
    monkeypatch.setattr(multiprocessing.resource_tracker, "ensure_running", print)
    with pytest.raises(
        worker_processes.WorkerError, match=r"the 1 worker processes .*: .*temporarily"
    ):
        next(iterate(chunks(keep), workers=1))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("status", "texts"),
    [
        (-signal.SIGBUS, ("SIGBUS", "memory or a disk was full", "data.workers")),
        (-signal.SIGSEGV, ("SIGSEGV: a library crashed",)),
        (-signal.SIGTERM, ("SIGTERM, which another program sent",)),
        (-77, ("signal 77",)),
        (1, ("ended with status 1. Its own message is above", "data.workers=0")),
    ],
)
def test_the_cause_of_death_is_named(status, texts, monkeypatch):
    worker = worker_processes._Worker(None, range(1), 2)
    worker._process = type("Dead", (), {"join": print, "exitcode": status, "pid": None})()
    said = worker._cause_of_death()
    worker.end()
    assert all(text in said for text in texts), said


SCRIPT = """
import contextlib, os, pickle, sys
import numpy as np
from convit_jax.data.open import open_source
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.model.image_size import pair

def large(image, rng):
    return np.full((224, 224, 3), image[0, 0, 0])

if __name__ == "__main__":
    assert os.statvfs("/dev/shm").f_blocks <= 16
    chunks = TrainChunks(open_source("digits", "train"), large, Share(128), seed=0)
    with contextlib.closing(iterate(chunks, workers=1)) as batches:
        print([next(batches)["image"].shape for _ in range(4)])
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
@pytest.mark.parametrize(
    "options", ["size=64k", pytest.param("size=64k,ro", marks=pytest.mark.slow)]
)
def test_workers_need_no_room_in_dev_shm(options, tmp_path):
    script = tmp_path / "feed.py"
    script.write_text(SCRIPT)
    prefix = ("unshare", "-rm", "bash", "-c")
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    allowed = subprocess.run((*prefix, mount), capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"needs user namespaces: {allowed.stderr}")
    done = subprocess.run(
        (*prefix, f'{mount} && exec "$@"', "-", sys.executable, script),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout == f"{[(128, 224, 224, 3)] * 4}\n", done.stderr
