"""Batches made ahead: by how many workers, in processes or threads, and how far ahead."""

import contextlib
import logging
import threading
import time

import numpy as np
import pytest

from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches import worker_processes, workers
from convit_jax.data.batches.chunks import CorruptImageError, EvalChunks, Share, TrainChunks
from convit_jax.data.source import Subset
from convit_jax.parallel import cpus, processes


def source(num: int = 64) -> ArraySource:
    images = np.arange(num, dtype=np.uint8).reshape(num, 1, 1, 1)
    names = np.array([f"image {i}".encode() for i in range(num)])
    return ArraySource(images, np.zeros(num, np.int32), ("a",), names)


class Counted:
    """A transform that counts the images, and fails at one of them."""

    def __init__(self, fails: int | None = None):
        self.count, self.fails = 0, fails

    def __call__(self, image: np.ndarray, rng: object = None) -> np.ndarray:
        self.count += 1
        if self.fails is not None and self.count > self.fails:
            raise CorruptImageError("not a JPEG")
        return image


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_thread_makes_two_batches_ahead_and_ends_when_closed():
    counted = Counted()
    batches = workers.iterate(TrainChunks(source(), counted, Share(4), seed=0))
    next(batches)
    end = time.monotonic() + 1200
    while counted.count < 12 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert counted.count == 12  # the batch that was taken, and two more
    assert threads()
    batches.close()
    assert not threads()


def test_an_error_in_the_thread_reaches_the_caller_at_its_batch():
    batches = workers.iterate(TrainChunks(source(), Counted(fails=8), Share(4), seed=0))
    next(batches)
    next(batches)
    with pytest.raises(CorruptImageError, match="not a JPEG"):
        next(batches)
    assert not threads()


@pytest.mark.parametrize("number", [1, 3])
def test_an_evaluation_of_few_images_starts_no_processes(number, monkeypatch):
    def refuse(*args):
        raise AssertionError("started processes")

    monkeypatch.setattr(worker_processes, "make", refuse)
    chunks = EvalChunks(source(60), Counted(), Share(8))
    with contextlib.closing(workers.iterate(chunks, workers=number)) as batches:
        seen = list(batches)
    images = np.concatenate([batch["image"][batch["mask"] > 0] for batch in seen])
    np.testing.assert_array_equal(images.ravel(), np.arange(60))
    with pytest.raises(AssertionError, match="started"):
        next(workers.iterate(TrainChunks(source(), Counted(), Share(8), seed=0), workers=number))
    monkeypatch.setattr(workers, "_FEW", 63)
    with pytest.raises(AssertionError, match="started"):  # padding included, it has 64 images
        next(workers.iterate(chunks, workers=number))


def test_the_cpus_are_divided_among_the_processes_of_the_host(monkeypatch):
    files = EvalChunks(source(), Counted(), Share(8))  # anything but images in memory
    monkeypatch.setattr(cpus, "available", lambda: 10)
    for sharing, expected in ((1, 10), (4, 2), (16, 1)):
        monkeypatch.setattr(processes, "on_this_host", lambda sharing=sharing: sharing)
        assert workers.num_workers(None, files) == expected
        assert workers.num_workers(None, source()) == 0
        assert workers.num_workers(None, Subset(source(), np.arange(3), "some")) == 0
        assert workers.num_workers(7, source()) == 7


@pytest.mark.parametrize(
    ("share", "multiple", "said"),
    [
        (Share(128), 8, None),
        (Share(12), 1, None),  # one chunk
        (Share(96), 1, None),  # chunks of 48
        (Share(4, 1, 2), 1, None),
        (
            Share(127),
            1,
            "train.batch_size=127: each process reads 127 images of a batch, which divide only "
            "into chunks of 1, and small chunks cost time; 128 makes chunks of 64",
        ),
        (
            Share(4 * 202, 0, 4),
            8,
            "train.batch_size=808: each process reads 202 images of a batch, which divide only "
            "into chunks of 2, and small chunks cost time; 768 makes chunks of 64",
        ),
    ],
)
def test_small_chunks_are_said_with_a_better_batch_size(share, multiple, said, caplog):
    caplog.set_level(logging.INFO)
    workers.warn_of_small_chunks(share, multiple)
    assert caplog.messages == ([] if said is None else [said])
