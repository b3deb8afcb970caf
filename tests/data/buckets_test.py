"""Data in a bucket are those on disk: the same images, in the same order, under the same names."""

import contextlib
import io
import itertools
import pathlib

import buckets
import make_imagenet
import numpy as np
from PIL import Image
import pytest

from convit_jax import storage
from convit_jax.data.batches.chunks import EvalChunks, Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.data.corrupt import CorruptImageError
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
    for indices in itertools.batched(range(len(expected)), 8):
        found.request([*indices, indices[0]])  # asked for twice, as by repeated augmentation
        for index in (*indices, indices[0]):
            one, other = found[index], expected[index]
            assert (one["image"], one["label"]) == (other["image"], other["label"])
            assert one["name"].split("/")[-3:] == other["name"].split("/")[-3:]


def test_a_tfds_set_in_a_bucket_is_that_on_disk(disk, bucket, monkeypatch):
    buckets.upload(disk / "tfrecord", bucket)
    indexed = []
    index_shard = bucket_records.index_shard
    monkeypatch.setattr(
        bucket_records, "index_shard", lambda *args: indexed.append(args) or index_shard(*args)
    )
    monkeypatch.setattr(bucket_records, "_BLOCK", 1000)  # smaller than some records
    monkeypatch.setattr(bucket_records, "_PARTS", 2)

    def opened(split):
        indexed.clear()
        source = open_source(NAME, split, data_dir=bucket, cache_dir=f"{bucket}/run/index")
        return source, len(indexed)

    for split in SPLITS:
        source, count = opened(split)
        assert count == 3
        assert_equal(source, open_source(NAME, split, data_dir=str(disk / "tfrecord")))
        assert f"3 shards in {bucket}/imagenet2012/5.1.0" in source.description
        assert opened(split)[1] == 0
    few = [
        open_source(NAME, "train", data_dir=d, sampling_ratio=0.5)
        for d in (bucket, str(disk / "tfrecord"))
    ]
    assert_equal(*few)
    assert check_images(source, 4)[1] == []
    # A shard that changes is indexed again, with the others of its part.
    shard = storage.as_path(
        f"{bucket}/imagenet2012/5.1.0/imagenet2012-train.tfrecord-00000-of-00003"
    )
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + b"?" + content[-4:])
    source, count = opened("train")
    assert count == 2
    with pytest.raises(CorruptImageError, match=r"gs://|s3://.*-00000-of-00003, record 6: .* fail"):
        source[6]
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"-00000-of-00003, record 6: the shard is truncated, at"):
        opened("train")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards of the train split are missing"):
        opened("train")


def test_class_folders_in_a_bucket_are_those_on_disk(disk, bucket, caplog):
    caplog.set_level("INFO", "convit_jax")
    buckets.upload(disk / "folder", bucket)
    lines = []
    for root in (f"{bucket}/", str(disk / "folder")):
        caplog.clear()
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
    path.unlink()
    with pytest.raises(CorruptImageError, match=f"{path}: cannot be read: no such object"):
        there[1][0]
    for other in others:
        other.unlink()
    with pytest.raises(FileNotFoundError, match=f"{bucket}/val: the folder of the images is gone"):
        there[1][0]
    with pytest.raises(FileNotFoundError, match=rf"data\.source: no folder {bucket}/nowhere;"):
        open_source(f"folder:{bucket}/nowhere", "train")
    with pytest.raises(ValueError, match=r"data\.source: expected a local path, gs://"):
        open_source("folder:az://b/x", "train")


def test_what_cannot_be_read_in_a_bucket_is_refused(disk, gcs):
    buckets.upload(disk / "array_record", gcs)
    with pytest.raises(ValueError, match=rf"{gcs}/.*: ArrayRecord .*--config\.data\.cache=PATH"):
        open_source(NAME, "train", data_dir=gcs)
    with pytest.raises(FileNotFoundError, match=f"convit data prepare .*--data_dir {gcs}/no"):
        open_source(NAME, "train", data_dir=f"{gcs}/no")
    with pytest.raises(FileNotFoundError, match=f"in {gcs}: imagenet2012"):
        open_source("tfds:cifar10", "train", data_dir=gcs)


def test_workers_read_the_same_batches_from_a_bucket(disk, gcs):
    buckets.upload(disk / "tfrecord", gcs)
    made = []
    for data_dir, workers in ((gcs, 1), (gcs, 0), (str(disk / "tfrecord"), 0)):
        train, test = (open_source(NAME, split, data_dir=data_dir) for split in SPLITS)
        chunks = TrainChunks(train, TrainTransform(16), Share(12), seed=1, repeats=3)
        with contextlib.closing(iterate(chunks, 1, 4, workers)) as batches:
            found = [{key: value.copy() for key, value in batch.items()} for batch in batches]
        with contextlib.closing(iterate(EvalChunks(test, EvalTransform(16), Share(4)))) as batches:
            made.append([*found, *batches])
        assert not getattr(train.shards, "ahead", storage.ReadAhead())._requested
    for batches in made[1:]:
        for one, other in zip(made[0], batches, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])
