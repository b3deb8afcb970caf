"""A bucket that does not answer is neither called damaged nor taken for empty."""

import pathlib

import numpy as np
import pytest

from convit_jax import storage
from convit_jax.cli import predict as command
from convit_jax.data.imagenet import prepare
from convit_jax.data.tfds import dataset, stored
from convit_jax.predict import Prediction, find_images, predict_files
from convit_jax.workdir import checkpoint_errors, record
from convit_jax.workdir.folder import Workdir


@pytest.fixture
def silent(gcs, monkeypatch):
    """The URL of a folder in a bucket that does not answer, after all tries."""
    storage.as_path(gcs)
    from convit_jax.storage.gcs import FileSystem

    async def fail(self, once, name, *args):
        raise storage.BucketError(f"{name}: gave up")

    monkeypatch.setattr(FileSystem, "_attempt", fail)
    return gcs


def test_what_cannot_be_read_is_not_called_damaged(silent):
    folder = storage.as_path(silent)

    def build():
        pytest.fail("the stored arrays may be there")

    for read in (
        lambda: dataset._tfds_info(folder),
        lambda: prepare._check_finished(folder, {}),
        lambda: stored.cached(f"{silent}/index.npz", "key", build),
        lambda: record.read_fingerprints(Workdir(silent)),
    ):
        with pytest.raises(storage.BucketError, match=r"gs://.*: gave up"):
            read()


def test_an_outage_is_known_through_the_errors_that_libraries_make_of_it():
    errors = []
    for first in (storage.BucketError("gave up"), KeyError("damaged")):
        try:
            try:
                raise first
            except Exception as error:
                raise ValueError("cannot be read") from error
        except ValueError as error:
            errors.append(error)
    found = [checkpoint_errors.outage(error, pathlib.Path("run")) for error in errors]
    assert [str(outage) for outage in found] == ["gave up", "None"]


class Stub:
    """Predicts a class without a model."""

    batch_size = 4

    def pixels(self, data):
        return np.zeros((1, 1, 3), np.uint8)

    def top(self, images, count):
        return [[Prediction("x", 0, 1.0)] for _ in images]


def test_prediction_ends_with_the_first_picture_that_a_bucket_does_not_give(silent, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    paths = [str(tmp_path / "a.png"), *(f"{silent}/{number}.png" for number in range(20))]
    predictions = predict_files(Stub(), paths)
    assert next(predictions) == (paths[0], [Prediction("x", 0, 1.0)])
    with pytest.raises(storage.BucketError, match=r"/0.png: gave up"):
        next(predictions)
    with pytest.raises(storage.BucketError, match="gave up"):
        find_images([f"{silent}/photos"])
    with pytest.raises(SystemExit, match=r"error: gs://.*: gave up"):
        command.main(["--weights", "x.pth", f"{silent}/photos"])
