"""Only damaged files and records, and links that lead nowhere, are called corrupt."""

import errno
import io
import shutil

import numpy as np
from PIL import Image
import pytest

from convit_jax.data.batches.chunks import EvalChunks, Share, TrainChunks
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.images.decode import decode
from convit_jax.data.open import open_source
from convit_jax.data.source import check_images, first_example
from convit_jax.data.tfds import records
from convit_jax.data.tfds.dataset import RecordSource


@pytest.fixture
def folder(tmp_path):
    """Two classes of four grey images each; the first is a link to a missing file."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8))
                image.save(tmp_path / split / name / f"{number}.png")
        first = tmp_path / split / "a/0.png"
        first.unlink()
        first.symlink_to(tmp_path / "moved.png")
    return tmp_path


def pixels(image, rng=None):
    return decode(image)


def test_a_link_to_a_missing_file_is_a_corrupt_image(folder):
    source = open_source(f"folder:{folder}", "train")
    message = r"a/0\.png: cannot be read: No such file or directory, a link to .*moved\.png"
    with pytest.raises(CorruptImageError, match=message):
        source[0]
    with pytest.raises(CorruptImageError, match=message):
        first_example(source, skip_corrupt=False)
    assert first_example(source, skip_corrupt=True)["name"].endswith("a/1.png")
    (text,) = check_images(source)[1]
    assert "a/0.png: cannot be read" in text
    share = Share(8)
    with pytest.raises(CorruptImageError, match=message + ".*skip_corrupt"):
        TrainChunks(source, pixels, share, seed=0)[0]
    batch = TrainChunks(source, pixels, share, seed=0, skip_corrupt=True)[0]
    assert batch["skipped"].sum() == 1
    assert EvalChunks(source, pixels, share, True)[0]["mask"].tolist() == [-1, *[1] * 7]


def test_a_missing_folder_and_a_fault_of_the_machine_are_not(folder, monkeypatch):
    source = open_source(f"folder:{folder}", "train")

    def no_more_files(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", no_more_files)
        with pytest.raises(OSError, match="Too many open files") as caught:
            source[1]
    assert not isinstance(caught.value, CorruptImageError)
    shutil.rmtree(folder / "train")
    with pytest.raises(FileNotFoundError, match="train: the folder of the images is gone"):
        TrainChunks(source, pixels, Share(8), seed=0, skip_corrupt=True)[0]


def test_memory_that_runs_out_is_not_a_corrupt_image(monkeypatch):
    def too_large(*_args):
        raise MemoryError

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "BMP")
    monkeypatch.setattr(Image, "open", too_large)
    with pytest.raises(MemoryError):
        decode(file.getvalue())


def test_a_broken_record_is_a_corrupt_image_and_a_wrong_shard_is_not(tmp_path):
    path = tmp_path / "shard"
    payload = b"\xff" * 20
    checksum = records.masked_crc32c(payload).to_bytes(4, "little")
    path.write_bytes(len(payload).to_bytes(8, "little") + bytes(4) + payload + checksum)
    shards = records.TFRecords((str(path),), (1,), np.array([[12, len(payload)]]))
    source = RecordSource(shards, "image", "label", None, ("a",), "", "")
    with pytest.raises(CorruptImageError, match=r"shard, record 0: not a tf\.train\.Example"):
        source[0]
    path.write_bytes(path.read_bytes().replace(b"\xff" * 20, b"\xff" * 19 + b"\xfe"))
    with pytest.raises(CorruptImageError, match=r"record 0: its 20 bytes fail their checksum"):
        source[0]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="changed since it was indexed") as caught:
        source[0]
    assert not isinstance(caught.value, CorruptImageError)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="record 0: No such file"):
        source[0]


@pytest.mark.parametrize(
    ("text", "corrupt"),
    [
        ("Corrupted Riegeli/records file: chunk data hash mismatch, chunk at 64", True),
        ("open() failed: Too many open files; opening /data/shard", False),
        ("open() failed: No such file or directory; opening /data/shard", False),
    ],
)
def test_array_records_are_corrupt_only_if_their_reader_says_so(text, corrupt):
    class Reader:
        def __getitem__(self, index):
            raise RuntimeError(text)

    shards = records.ArrayRecords(("shard",), (1,))
    shards.__dict__["_reader"] = Reader()
    with pytest.raises(ValueError, match="shard, record 0: ") as caught:
        shards[0]
    assert isinstance(caught.value, CorruptImageError) == corrupt
