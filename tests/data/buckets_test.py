"""Data in a bucket are those on disk: the same images, in the same order, under the same names."""

import contextlib
import io
import pathlib
import re

import buckets
import make_imagenet
import numpy as np
from PIL import Image
import pytest
import runs

from convit_jax import storage
from convit_jax.data.batches.chunks import EvalChunks, Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.folders import class_folders
from convit_jax.data.images.transforms import EvalTransform, TrainTransform
from convit_jax.data.open import SPLITS, open_source
from convit_jax.data.source import check_images
from convit_jax.data.tfds import bucket_records

SYNSETS = ("n01440764", "n01443537", "n01484850")
NAME = "tfds:imagenet2012"


def write_jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> pathlib.Path:
    """Small images as TFRecord, as ArrayRecord, and as class folders."""
    root = tmp_path_factory.mktemp("data")
    examples = {
        split: [
            make_imagenet.Example(f"{split}-{synset}-{i}.JPEG", synset, write_jpeg(7 * i + place))
            for place, synset in enumerate(SYNSETS)
            for i in range(count)
        ]
        for split, count in (("train", 7), ("validation", 3))
    }
    for file_format in ("tfrecord", "array_record"):
        make_imagenet.write_tfds(root / file_format, examples, file_format, shards=3)
    make_imagenet.write_folder(root / "folder", examples)
    for name in (".hidden", "notes.txt", "deep/er/1.jpg", "deep/.thumbs/2.jpg"):
        file = root / "folder/train" / SYNSETS[0] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(examples["train"][0].image)
    return root


def assert_equal(found, expected) -> None:
    """Compares two sources, reading a few images at a time, as batches do."""
    assert found.class_names == expected.class_names
    np.testing.assert_array_equal(found.fingerprints(), expected.fingerprints())
    for one, other in zip(found.names_and_labels(), expected.names_and_labels(), strict=True):
        np.testing.assert_array_equal(one, other)
    for start in range(0, len(expected), 8):
        # The first is asked for twice, as by repeated augmentation.
        indices = [*range(start, min(start + 8, len(expected))), start]
        found.request(indices)
        for index in indices:
            one, other = found[index], expected[index]
            assert (one["image"], one["label"]) == (other["image"], other["label"])
            assert one["name"].split("/")[-3:] == other["name"].split("/")[-3:]


def test_a_tfds_set_in_a_bucket_is_that_on_disk(disk, bucket):
    buckets.upload(disk / "tfrecord", bucket)
    for split in SPLITS:
        source = open_source(NAME, split, data_dir=bucket)
        assert_equal(source, open_source(NAME, split, data_dir=str(disk / "tfrecord")))
        assert f"3 shards in {bucket}/imagenet2012/5.1.0" in source.description
    assert check_images(source, 4)[1] == []


def test_the_index_of_a_bucket_is_kept_in_parts_until_a_shard_changes(disk, gcs, monkeypatch):
    buckets.upload(disk / "tfrecord", gcs)
    indexed = []
    index_shard = bucket_records.index_shard
    monkeypatch.setattr(
        bucket_records, "index_shard", lambda *args: indexed.append(args[0]) or index_shard(*args)
    )
    monkeypatch.setattr(bucket_records, "_BLOCK", 1000)  # smaller than some records
    monkeypatch.setattr(bucket_records, "_PARTS", 2)
    where = {"data_dir": gcs, "cache_dir": f"{gcs}/run/index"}

    def opened(process=0, processes=1):
        indexed.clear()
        with monkeypatch.context() as patch:
            patch.setattr("jax.process_index", lambda: process)
            patch.setattr("jax.process_count", lambda: processes)
            source = open_source(NAME, "train", **where)
        return source, [int(path.rpartition("train.tfrecord-")[2][:5]) for path in indexed]

    # The second process of two begins with the second part.
    assert opened(1, 2)[1][0] == 2
    source, shards = opened()
    assert shards == []
    assert_equal(source, open_source(NAME, "train", data_dir=str(disk / "tfrecord")))
    parts = sorted(path.name for path in storage.as_path(where["cache_dir"]).iterdir())
    assert parts == [f"imagenet2012-5.1.0-train-index-0{part}.npz" for part in range(2)]
    places = (where, {"data_dir": str(disk / "tfrecord")})
    assert_equal(*(open_source(NAME, "train", sampling_ratio=0.5, **place) for place in places))
    # A shard that changes is indexed again, with the others of its part.
    shard = storage.as_path(gcs) / "imagenet2012/5.1.0/imagenet2012-train.tfrecord-00000-of-00003"
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + b"?" + content[-4:])
    source, shards = opened()
    assert sorted(shards) == [0, 1]
    with pytest.raises(CorruptImageError, match=r"-00000-of-00003, record 6: its .* fail their"):
        source[6]
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"-00000-of-00003, record 6: the shard is truncated, at"):
        opened()
    buckets.remove(shard)
    with pytest.raises(FileNotFoundError, match="1 of 3 shards of the train split are missing"):
        opened()


def test_class_folders_in_a_bucket_are_those_on_disk(disk, bucket, caplog):
    caplog.set_level("INFO", "convit_jax")
    buckets.upload(disk / "folder", bucket)
    lines = []
    for root in (f"{bucket}/", str(disk / "folder")):
        caplog.clear()
        class_folders._say.cache_clear()
        train, test = (open_source(f"folder:{root}", split) for split in SPLITS)
        lines.append(caplog.text.partition("train: ")[2])
        if root.startswith(bucket):
            there = (train, test)
    assert "left out: 1 .txt, 1 hidden file, 1 hidden folder" in lines[0]
    assert lines[0] == lines[1]
    assert_equal(there[0], train)
    assert_equal(there[1], test)
    # Undivided class folders, numbered by a list that is in the bucket too.
    order = storage.as_path(f"{bucket}/order.txt")
    order.write_text("\n".join(reversed(SYNSETS)))
    path = f"{bucket}/train"
    part = open_source(f"folder:{path}", "test", val_fraction=0.5, class_order=str(order))
    assert part.class_names == SYNSETS[::-1]
    assert part[0]["name"].startswith(f"{path}/{SYNSETS[-1]}/")
    # One image that is gone is corrupt; if all are, the run ends.
    (path, *others) = [storage.as_path(there[1][i]["name"]) for i in range(len(test))]
    buckets.remove(path)
    with pytest.raises(
        CorruptImageError, match=re.escape(f"{path}: cannot be read: no such object")
    ):
        there[1][0]
    for other in others:
        buckets.remove(other)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{bucket}/val: the folder of")):
        there[1][0]
    with pytest.raises(FileNotFoundError, match=re.escape(f"no folder {bucket}/nowhere;")):
        open_source(f"folder:{bucket}/nowhere", "train")
    with pytest.raises(ValueError, match=r"data\.source: expected a local path, gs://"):
        open_source("folder:az://b/x", "train")


def test_what_cannot_be_read_in_a_bucket_is_refused(disk, gcs):
    buckets.upload(disk / "array_record", gcs)
    with pytest.raises(ValueError, match=rf"{gcs}/.*: ArrayRecord .*--config\.data\.cache=PATH"):
        open_source(NAME, "train", data_dir=gcs)
    with pytest.raises(FileNotFoundError, match=f"convit data prepare .*--data_dir {gcs}/no"):
        open_source(NAME, "train", data_dir=f"{gcs}/no")
    # A bucket is read in TFRecord alone.
    text = f"in {gcs}: imagenet2012.*tfds build cifar10 --file_format=tfrecord --data_dir {gcs} "
    with pytest.raises(FileNotFoundError, match=text):
        open_source("tfds:cifar10", "train", data_dir=gcs)


def test_batches_from_a_bucket_are_those_from_disk(disk, gcs):
    buckets.upload(disk / "tfrecord", gcs)
    made = []
    for data_dir in (gcs, str(disk / "tfrecord")):
        train, test = (open_source(NAME, split, data_dir=data_dir) for split in SPLITS)
        chunks = TrainChunks(train, TrainTransform(16), Share(12), seed=1, repeats=3)
        with contextlib.closing(iterate(chunks, 1, 4)) as batches:
            found = [{key: value.copy() for key, value in batch.items()} for batch in batches]
        with contextlib.closing(iterate(EvalChunks(test, EvalTransform(16), Share(4)))) as batches:
            made.append([*found, *batches])
        assert not getattr(train.shards, "ahead", storage.ReadAhead())._requested
    for one, other in zip(*made, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.slow
def test_a_run_on_data_in_a_bucket_equals_one_on_data_on_disk(disk, gcs, tmp_path):
    """A worker process reads the images, and every image gets the same prediction."""
    buckets.upload(disk / "tfrecord", gcs)
    folders = []
    for name, data_dir in (("bucket", gcs), ("disk", disk / "tfrecord")):
        folders.append(tmp_path / name)
        programs = f"--config.compilation_cache={tmp_path / 'programs'}"  # both need the same ones
        flags = (*runs.SMALL, f"--config.data.dir={data_dir}", programs)
        for more in ((), ("--mode=eval", "--predictions")):
            runs.finish(runs.start(folders[-1], *flags, *more, devices=1), folders[-1])
        assert "Traceback" not in runs.output(folders[-1])
    assert "3 shards, 0.0 GB, to index their records, and kept in" in runs.output(folders[0])
    in_bucket, on_disk = folders
    assert runs.metrics(in_bucket) == runs.metrics(on_disk)
    predictions = [(folder / "predictions.jsonl").read_text() for folder in folders]
    assert len(predictions[0].splitlines()) == 9
    assert predictions[0] == predictions[1]
