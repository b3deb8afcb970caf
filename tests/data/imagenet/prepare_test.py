"""ImageNet from small tars: tfds reads the result, bad tars are refused, killed runs continue."""

import base64
import errno
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile

import buckets
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from convit_jax import storage
from convit_jax.data.imagenet import prepare, tar_files
from convit_jax.data.open import open_source

# Images of each class. The named ones are on tfds' lists; their content is made to match.
CLASSES = {"n02105855": 5, "n01739381": 4, "n13037406": 4}
CMYK, PNG, GREY = "n01739381_1309.JPEG", "n02105855_2933.JPEG", "n13037406_7.JPEG"
COUNTS = {
    "classes": 3,
    "train_images": 13,
    "validation_images": 6,
    "train_shards": 4,
    "validation_shards": 2,
}

# A CMYK JPEG of 16x24 pixels, quality 40, as Pillow writes it (with Adobe's marker).
CMYK_16X24 = (
    "|JeWT01iQ9Z(?NtWB>pF0095n07C#24i6F!4HOa(5*HN|7#=bq9vmDVJuEIHGD$#8OGiLPMNnFEVo+6WRz*f+h-Gbe"
    "dx3(1PGF6fjD41Ket~@dzyK5o01yBe1Va%3O%VWD5dcdO0RO}Q7ytkR0RaF20000000000000971pxy8!~iG|00IF6"
    "0t5yF00000000000RsX61QG=i1`|PH6(KQEagh`vLjT$T4g^C0O#oQ{O8@{r0Dx~lC-vLbx$qJE%o;t94#!MyIxQ0;"
    "+O=AAG}Fvm1jy(rrkA3@@ycuw`JyiUni$8FWDjZ%zjW)3pcOBwYsVzPgqB5ddWPCC#ZW8*s1=jcJV5g#G2fx3EVxkK"
    "ubC!bPf7z5E2EGewDLGdlRS*crfgnTz+`u)Z7x`eiB3jCy&<DTlXwi7knc+B*6gw)1`)TlRCHB&A2pAvwyTuhN6k^+"
    ";;U+~g7L;6QLH$PcIm;Y6F%moze*V#4kNWL_LR$Lc@EW2NmOQlNU#6d"
)


def encode(seed: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """Encodes a smooth picture, different for each seed and a little larger than a JPEG block."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    small = rng.integers(0, 256, (5, 6, channels), np.uint8)
    bands = [Image.fromarray(small[..., c]).resize((48, 40)) for c in range(channels)]
    out = io.BytesIO()
    Image.merge(mode, bands).save(out, kind, quality=90)
    return out.getvalue()


def train_files() -> dict[str, dict[str, bytes]]:
    """{class: {file name: bytes}}, with a CMYK image, a PNG and a greyscale one."""
    special = {CMYK: encode(0, "CMYK"), PNG: encode(1, kind="PNG"), GREY: encode(2, "L")}
    files = {}
    for i, (wnid, count) in enumerate(CLASSES.items()):
        images = {name: data for name, data in special.items() if name.startswith(wnid)}
        for j in range(count - len(images)):
            images[f"{wnid}_{100 + j}.JPEG"] = encode(10 * i + j + 10)
        files[wnid] = images
    return files


def validation_files() -> dict[str, bytes]:
    numbers = [3, 1, 2, 6, 5, 4]  # a tar need not be in order
    return {f"ILSVRC2012_val_{n:08d}.JPEG": encode(100 + n) for n in numbers}


def write_tar(target, files: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder: pathlib.Path, train=None, validation=None) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner = {}
    for wnid, files in (train or train_files()).items():
        out = io.BytesIO()
        write_tar(out, files)
        inner[f"{wnid}.tar"] = out.getvalue()
    with open(folder / tar_files.TRAIN_TAR, "wb") as file:
        write_tar(file, inner)
    with open(folder / tar_files.VALIDATION_TAR, "wb") as file:
        write_tar(file, validation or validation_files())
    return folder


def run(tars: pathlib.Path, data_dir: pathlib.Path, **changes) -> pathlib.Path:
    return prepare.prepare_imagenet(tars, data_dir, progress=False, **(COUNTS | changes))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: pathlib.Path, split: str) -> list[dict]:
    """The examples as tfds reads them, the images as bytes."""
    source = tfds.builder_from_directory(folder).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    return run(tars, tmp_path_factory.mktemp("data"))


def test_tfds_reads_every_training_image(prepared):
    # Labels known from elsewhere: vine snake 59, Shetland sheepdog 230, gyromitra 993.
    labels = {"n01739381": 59, "n02105855": 230, "n13037406": 993}
    files = {name: data for images in train_files().values() for name, data in images.items()}
    examples = read(prepared, "train")
    assert sorted(x["file_name"].decode() for x in examples) == sorted(files)
    for example in examples:
        name = example["file_name"].decode()
        assert example["label"] == labels[name.split("_")[0]]
        assert (example["image"] == files[name]) == (name not in (CMYK, PNG))


def test_tfds_reads_every_validation_image(prepared):
    labels = {1: 65, 2: 970, 3: 230, 4: 809, 5: 516, 6: 57}  # the head of Caffe's val.txt
    expected = {f"ILSVRC2012_val_{n:08d}.JPEG": (labels[n], encode(100 + n)) for n in range(1, 7)}
    found = {
        x["file_name"].decode(): (int(x["label"]), x["image"]) for x in read(prepared, "validation")
    }
    assert found == expected


def test_order_and_metadata_are_those_of_tfds(prepared):
    # The order in which tfds 4.9.10 with TensorFlow 2.21 wrote the records of these tars.
    train = "01739381_102 13037406_101 01739381_100 02105855_2933 02105855_101 13037406_102 "
    train += "01739381_1309 02105855_102 01739381_101 13037406_100 02105855_103 13037406_7 "
    train += "02105855_100"
    names = [x["file_name"].decode() for x in read(prepared, "train")]
    assert names == [f"n{name}.JPEG" for name in train.split()]
    names = [x["file_name"].decode() for x in read(prepared, "validation")]
    assert names == [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (2, 4, 1, 3, 5, 6)]

    info = tfds.builder_from_directory(prepared).info
    assert info.full_name == "imagenet2012/5.1.0"
    assert info.splits["train"].shard_lengths == [3, 3, 4, 3]
    assert info.features["label"].num_classes == 1000
    assert info.features["label"].int2str(59) == "n01739381"
    shards = {f"imagenet2012-train.array_record-{i:05d}-of-00004" for i in range(4)}
    shards |= {f"imagenet2012-validation.array_record-{i:05d}-of-00002" for i in range(2)}
    metadata = {"dataset_info.json", "features.json", "label.labels.txt"}
    assert set(contents(prepared)) == shards | metadata
    # The values that tfds with TensorFlow wrote for the same tars: the bytes of all records.
    splits = json.loads((prepared / "dataset_info.json").read_text())["splits"]
    assert [split["numBytes"] for split in splits] == ["18620", "7952"]


def test_default_shards_are_those_tfds_chooses():
    config = tfds.core.utils.shard_utils.ShardConfig
    defaults = prepare.prepare_imagenet.__kwdefaults__
    # The tars are 0.5% larger than their images, which does not change the number of shards.
    assert config.calculate_number_shards(147_897_477_120, 1_281_167) == defaults["train_shards"]
    assert config.calculate_number_shards(6_744_924_160, 50_000) == defaults["validation_shards"]
    assert len(tar_files.encoded_by_tfds()) == 23


def test_special_images_decode_as_rgb(prepared):
    decoded = tfds.builder_from_directory(prepared).as_data_source("train")
    assert {decoded[i]["image"].shape for i in range(len(decoded))} == {(40, 48, 3)}
    images = {x["file_name"].decode(): x["image"] for x in read(prepared, "train")}
    for name, original in ((CMYK, encode(0, "CMYK")), (PNG, encode(1, kind="PNG"))):
        image = Image.open(io.BytesIO(images[name]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        expected = np.asarray(Image.open(io.BytesIO(original)).convert("RGB"), np.float32)
        # The error of 4:2:0 at quality 100 on a picture of strong colours.
        assert np.abs(np.asarray(image) - expected).mean() < 2.5
    assert Image.open(io.BytesIO(images[GREY])).mode == "L"


@pytest.mark.parametrize(
    ("adobe", "expected"),
    [
        (True, "89e802d0a6093029ef67c61ca0a5667bea8a500f3723cb54454ba3b22049061f"),
        (False, "b6c349d2d0734ac6582e97851de1c5d887ff41f9c8523b73828d7c6f62d44fa5"),
    ],
)
def test_cmyk_gives_the_bytes_of_tensorflow(adobe, expected):
    # Hashes of the bytes that tfds.core.utils.jpeg_cmyk_to_rgb returned with TensorFlow 2.21.
    data = base64.b85decode(CMYK_16X24)
    if not adobe:
        start = data.index(b"\xff\xee\x00\x0eAdobe")
        data = data[:start] + data[start + 16 :]
    assert hashlib.sha256(tar_files.as_rgb_jpeg(data)).hexdigest() == expected


def test_frame_header_is_found_behind_padding_and_other_segments():
    data = encode(3, "CMYK")
    comment = b"\xff\xff\xff\xfe\x00\x09\xff\xc0abcde"  # padded, and a frame header's marker in it
    assert tar_files.as_rgb_jpeg(data[:2] + comment + data[2:]) == tar_files.as_rgb_jpeg(data)
    for wrong in (b"", b"\xff\xd8", b"GIF89a" + bytes(50), data[:20]):
        with pytest.raises(ValueError, match="neither JPEG nor PNG"):
            tar_files.as_rgb_jpeg(wrong)


def cut(size: int):
    return lambda path: os.truncate(path, path.stat().st_size - size if size < 0 else size)


def swap_class(folder):
    files = train_files()
    files["n00000001"] = files.pop("n01739381")
    write_tars(folder, train=files)


def drop_class(folder):
    write_tars(folder, train={k: v for k, v in train_files().items() if k != "n01739381"})


def same_name_twice(folder):
    files = train_files()
    files["n13037406"][CMYK] = files["n13037406"].pop(GREY)
    write_tars(folder, train=files)


def other_number(folder):
    files = validation_files()
    files["ILSVRC2012_val_00000009.JPEG"] = files.pop("ILSVRC2012_val_00000006.JPEG")
    write_tars(folder, validation=files)


def fewer_in_validation(folder):
    write_tars(folder, validation=dict(list(validation_files().items())[:5]))


def fewer_in_train(folder):
    files = train_files()
    del files["n02105855"][PNG]
    write_tars(folder, train=files)


TRAIN, VALIDATION = tar_files.TRAIN_TAR, tar_files.VALIDATION_TAR


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / TRAIN).unlink(), f"{TRAIN}: no such file"),
        (lambda d: (d / VALIDATION).unlink(), f"{VALIDATION}: no such file"),
        (lambda d: cut(0)(d / TRAIN), f"{TRAIN}: expected a whole, uncompressed tar"),
        (lambda d: cut(700)(d / TRAIN), f"{TRAIN}: expected a whole, uncompressed tar"),
        (lambda d: cut(20_000)(d / TRAIN), f"{TRAIN}: expected .*tar.*; found"),
        (lambda d: cut(3_000)(d / VALIDATION), f"{VALIDATION}: expected a whole, uncompressed tar"),
        (lambda d: cut(512)(d / VALIDATION), f"{VALIDATION}: expected .*; found"),
        (lambda d: (d / TRAIN).write_bytes(bytes(range(256)) * 9), f"{TRAIN}: .*uncompressed tar"),
        (
            lambda d: (d / VALIDATION).write_bytes(gzip.compress((d / VALIDATION).read_bytes())),
            f"{VALIDATION}: .*uncompressed tar",
        ),
        (swap_class, f"{TRAIN}: expected tars of ImageNet's classes; found also n00000001"),
        (drop_class, f"{TRAIN}: expected tars of 3 classes; found 2"),
        (same_name_twice, f"{TRAIN}: expected each file name once; .*{CMYK}"),
        (fewer_in_train, f"{TRAIN}: expected 13 images; found 12"),
        (fewer_in_validation, f"{VALIDATION}: expected 6 images; found 5"),
        (other_number, f"{VALIDATION}: expected images numbered 1 to 6; .*_00000009.JPEG"),
    ],
)
def test_wrong_tars_are_named_and_nothing_is_written(tmp_path, damage, named):
    folder = write_tars(tmp_path / "tars")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=named) as error:
        run(folder, tmp_path / "data")
    assert "image-net.org" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    folder = write_tars(tmp_path / "tars")
    whole = (folder / TRAIN).read_bytes()
    # The file ends in padding and the end marks of two tars, 1,024 bytes each: no image is there.
    for size in range(0, len(whole) - 20_480, 512):
        (folder / TRAIN).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=TRAIN):
            tar_files.index_train(folder / TRAIN, 3, 13)


def test_damaged_image_is_named_and_nothing_is_readable(tmp_path):
    files = train_files()
    files["n13037406"][GREY] = b"<html>not found</html>"
    folder = write_tars(tmp_path / "tars", train=files)
    with pytest.raises(ValueError, match=f"{TRAIN}: {GREY}: damaged"):
        run(folder, tmp_path / "data")
    (left,) = (tmp_path / "data" / "imagenet2012").iterdir()
    assert left.name == "5.1.0.incomplete"
    with pytest.raises(tfds.core.dataset_info.DatasetInfoFileError):
        tfds.builder_from_directory(left)


KILLED = """
import os, pathlib, signal, sys
import json
from convit_jax.data.imagenet import prepare
calls, record = [], prepare.record

def record_or_die(*args):
    calls.append(args)
    if len(calls) == 8:  # within the third shard
        os.kill(os.getpid(), signal.SIGKILL)
    return record(*args)

if sys.argv[2] == "kill":
    prepare.record = record_or_die
tars, data_dir = map(pathlib.Path, sys.argv[1].split(os.pathsep))
prepare.prepare_imagenet(tars, data_dir, progress=False, **json.loads(sys.argv[3]))
print(len(calls), "tensorflow" in sys.modules)
"""


def test_killed_run_goes_on_to_the_same_bytes(tars, prepared, tmp_path):
    def start(mode: str) -> subprocess.CompletedProcess:
        folders = f"{tars}{os.pathsep}{tmp_path}"
        command = [sys.executable, "-c", KILLED, folders, mode, json.dumps(COUNTS)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1200)

    killed = start("kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    incomplete = tmp_path / "imagenet2012" / "5.1.0.incomplete"
    kept = sorted(incomplete.glob("*-of-0000?"))
    assert [path.name[-14:] for path in kept] == ["00000-of-00004", "00001-of-00004"]
    with pytest.raises(tfds.core.dataset_info.DatasetInfoFileError):
        tfds.builder_from_directory(incomplete)
    times = {path.name: path.stat().st_mtime_ns for path in kept}

    resumed = start("finish")
    assert resumed.stdout.split() == ["0", "False"], resumed.stderr  # no TensorFlow
    assert contents(incomplete.with_name("5.1.0")) == contents(prepared)
    assert not incomplete.exists()
    for name, time in times.items():
        assert (incomplete.with_name("5.1.0") / name).stat().st_mtime_ns == time


@pytest.fixture
def half_done(tars, tmp_path, monkeypatch):
    """A run that fails before its last shard; returns the folder it leaves."""
    with monkeypatch.context() as patch:
        write = prepare._write_shard

        def fail_at_last(path, *args):
            if "validation.array_record-00001" in path.name:
                raise OSError("No space left on device")
            return write(path, *args)

        patch.setattr(prepare, "_write_shard", fail_at_last)
        with pytest.raises(OSError, match="No space left"):
            run(tars, tmp_path)
    return tmp_path / "imagenet2012" / "5.1.0.incomplete"


def test_damaged_shard_is_written_again(tars, prepared, tmp_path, half_done):
    names = sorted(path.name for path in half_done.glob("*-of-0000?"))
    assert len(names) == 5
    os.truncate(half_done / names[1], 1000)
    (half_done / names[2]).unlink()
    assert contents(run(tars, tmp_path)) == contents(prepared)


def test_other_tars_or_shards_do_not_go_on(tars, tmp_path, half_done):
    before = contents(half_done)
    with pytest.raises(ValueError, match=r"5.1.0.incomplete: expected shards of these tars"):
        run(tars, tmp_path, train_shards=3)
    files = train_files()
    files["n13037406"][GREY] = encode(77)
    with pytest.raises(ValueError, match="Delete the folder"):
        run(write_tars(tmp_path / "tars", train=files), tmp_path)
    assert contents(half_done) == before


def test_second_run_at_once_is_refused(tars, tmp_path, half_done):
    with (
        storage.locked(half_done),
        pytest.raises(BlockingIOError, match="another process is writing here"),
    ):
        run(tars, tmp_path)
    assert run(tars, tmp_path).is_dir()


def test_too_little_room_is_noticed_first(tars, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"bytes of free disk .* found 100,000") as error:
        run(tars, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "imagenet2012" / "5.1.0.incomplete").iterdir()) == []


def test_failing_disk_is_named_and_the_run_goes_on(tars, prepared, tmp_path):
    shard = (
        f"imagenet2012-train.array_record-00002-of-00004.{socket.gethostname()}-{os.getpid()}.part"
    )
    obstacle = tmp_path / "imagenet2012" / "5.1.0.incomplete" / shard
    obstacle.mkdir(parents=True)  # nobody can write a file there
    with pytest.raises(OSError, match=f"{shard}.*: mend it, and start again"):
        run(tars, tmp_path)
    obstacle.rmdir()
    assert contents(run(tars, tmp_path)) == contents(prepared)


def test_a_bucket_gets_the_same_tfrecords_after_a_kill(tars, prepared, bucket, monkeypatch):
    bucket = bucket.partition("[")[0]  # fsspec deletes by patterns
    folder = storage.as_path(bucket) / "imagenet2012" / "5.1.0"
    write, upload, names = prepare._write_shard, storage.whole._uploaded, []

    def fail_at_third(path, *args):
        if len(names) == 2:
            raise KeyboardInterrupt  # nothing cleans up in the bucket
        names.append(path.name)
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_shard", fail_at_third)
        with pytest.raises(KeyboardInterrupt):
            run(tars, bucket)
    assert {path.name for path in folder.iterdir()} == {*names, "progress.json"}
    with pytest.raises(ValueError, match="expected shards of these tars"):
        run(tars, bucket, train_shards=3)

    def uploaded(path):
        names.append(path.name)
        if path == folder / "dataset_info.json":
            buckets.remove(folder / "progress.json")  # another run has written the same shards
        return upload(path)

    monkeypatch.setattr(storage.whole, "_uploaded", uploaded)
    assert os.fspath(run(tars, bucket)) == os.fspath(folder)
    assert names[-1] == "dataset_info.json"
    assert len(set(names[:2]) & set(names[2:])) == 0
    count = len(names)
    run(tars, bucket)  # finds it complete
    assert len(names) == count
    assert contents(folder) == contents(run(tars, f"{bucket}-at-once"))
    for split in ("train", "test"):  # read where they are
        there, here = (
            open_source("tfds:imagenet2012", split, data_dir=str(data_dir))
            for data_dir in (bucket, prepared.parents[1])
        )
        assert [there[i] for i in range(len(there))] == [here[i] for i in range(len(here))]
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileExistsError, match="expected no folder, or"):
        run(tars, bucket)
    with pytest.raises(ValueError, match=r"data_dir: expected a URL without \* .* got .*/\[1\]"):
        run(tars, f"{bucket}/[1]")
    with pytest.raises(ValueError, match="tars: expected a folder on a disk"):
        run(folder, prepared.parents[2])


def test_finished_data_set_is_left_alone(tars, prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert run(tars, prepared.parents[1]) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"5.1.0: expected no folder, or .*'train': 12"):
        run(tars, prepared.parents[1], train_images=12)
    # The same folder holds the data set in tfds' default format.
    folder = tmp_path / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="found nothing that tfds reads"):
        run(tars, tmp_path)
    prepare.write_metadata(folder, {"train": ([13], 1), "validation": ([6], 1)}, "tfrecord")
    with pytest.raises(FileExistsError, match=r"found .* as tfrecord"):
        run(tars, tmp_path)


def test_difference_from_the_list_of_tfds_is_reported(tmp_path, caplog):
    files = train_files()
    files["n13037406"][GREY] = encode(2, "CMYK")  # not on the list
    files["n02105855"][PNG] = encode(1)  # on the list, but a JPEG
    run(write_tars(tmp_path / "tars", train=files), tmp_path)
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"not on tfds' list: {GREY};" in message
    assert message.endswith(f"here: {PNG}")


def test_wrong_numbers_of_shards(tars, tmp_path):
    for shards in (0, 14):
        with pytest.raises(ValueError, match=f"train: expected 1 to 13 shards, got {shards}"):
            run(tars, tmp_path, train_shards=shards)
