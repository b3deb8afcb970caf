"""data.cache: a local copy of a tfds data set, made once, whole and checked."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys

import buckets
import make_imagenet
import pytest

from convit_jax import storage
from convit_jax.data import local_copy
from convit_jax.data.open import SPLITS, open_source

NAME = "tfds:imagenet2012"

# Forks processes that copy one file after the other: one is killed within its third file, then two
# begin while the folder is locked. Each prints how many files it copied.
COPYING = """
import logging, os, pathlib, signal, sys
from convit_jax import storage
from convit_jax.data import local_copy
from convit_jax.storage import copies
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
difference, count, dies = copies._difference, 0, True
cache, folder, *files = sys.argv[1:]

def count_or_die(path, size, expected):
    global count
    count += 1
    if count == 3 and dies:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return difference(path, size, expected)

def fork(start):
    child = os.fork()
    if not child:
        os.read(start, 1)
        local_copy.copied(files, cache)
        os.write(1, f"copied {count}\\n".encode())  # one line, whole
        os._exit(0)
    return child

copies._difference = count_or_die
local_copy.in_threads = lambda verb, unit, function, *items: [*map(function, *items)]
start, go = os.pipe()
os.write(go, b"1")
child = fork(start)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sorted(os.listdir(folder)), flush=True)
dies = False
children = [fork(start), fork(start)]
with storage.locked(pathlib.Path(folder)):
    os.write(go, b"23")
    sys.stdin.readline()
for child in children:
    os.waitpid(child, 0)
"""


@pytest.fixture
def files(tmp_path):
    """Paths of six files."""
    folder = tmp_path / "slow"
    folder.mkdir()
    paths = [folder / f"shard-{i}" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(os.urandom(1000 + i))
    return [str(path) for path in paths]


def test_a_killed_copy_is_continued_by_one_of_two_processes(files, tmp_path):
    cache = tmp_path / "cache"
    folder = local_copy._place(tmp_path / "slow", cache)
    command = [sys.executable, "-u", "-c", COPYING, str(cache), str(folder), *files]
    lines = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while sum("waiting for another process" in line for line in lines) < 2:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        lines += process.communicate("both wait\n")[0].splitlines()
    killed = next(line for line in lines if line.startswith("-9 "))
    assert re.fullmatch(r"-9 \['shard-0', 'shard-1', 'shard-2.*\.part'\]\n", killed)
    assert sorted(line for line in lines if line.startswith("copied")) == ["copied 0", "copied 4"]
    assert "copying 4 files, 4,014 bytes" in "".join(lines)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "slow").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_unfinished_copies_are_kept_where_another_process_may_be_writing_them(
    files, tmp_path, monkeypatch, caplog
):
    cache = tmp_path / "cache"
    unfinished = local_copy._place(tmp_path / "slow", cache) / "shard-0.host-1.part"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()

    def raise_no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", raise_no_locks)
        local_copy.copied(files, str(cache))
    assert "cannot be locked" in caplog.text
    assert unfinished.exists()
    os.utime(files[0], (1, 1))
    local_copy.copied(files, str(cache))
    assert not unfinished.exists()


def test_what_is_missing_or_has_changed_is_copied_if_it_fits(files, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    cache = tmp_path / "cache"
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:4], 6014 // real.f_frsize, *real[5:]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: full)
        free = shutil.disk_usage(tmp_path).free
        text = f"expected 6,015 bytes of free disk for 6 files of .*slow, found {free:,}: make room"
        with pytest.raises(OSError, match=text) as raised:
            local_copy.copied(files, str(cache))
    assert raised.value.errno == errno.ENOSPC
    folder = local_copy._place(tmp_path / "slow", cache)
    assert list(folder.iterdir()) == []
    assert local_copy.copied(files, str(cache)) == folder
    os.utime(files[2], (1, 1))
    with open(files[3], "a") as file:
        file.write("more")
    caplog.clear()
    local_copy.copied(files, str(cache))
    assert "copying 2 files" in caplog.text
    assert "2 of them have changed since they were copied" in caplog.text
    for path in (tmp_path / "slow").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert int((folder / path.name).stat().st_mtime) == int(path.stat().st_mtime)
    caplog.clear()
    local_copy.copied(files, str(cache))
    assert not caplog.records
    with pytest.raises(FileNotFoundError, match="none: no such shard"):
        local_copy.copied([*files, str(tmp_path / "slow" / "none")], str(cache))
    with pytest.raises(ValueError, match=r"data\.cache: expected a folder on a local disk"):
        local_copy.copied(files, "gs://bkt/cache")


def test_objects_of_a_bucket_are_copied_once(bucket, files, tmp_path, caplog):
    caplog.set_level("INFO")
    for path in files:
        with storage.whole_file(f"{bucket}/data/{os.path.basename(path)}") as unfinished:
            shutil.copy(path, unfinished)
    urls = [f"{bucket}/data/{os.path.basename(path)}" for path in files]
    folder = local_copy.copied(urls[:4], str(tmp_path / "cache"))
    assert folder == tmp_path / "cache" / bucket.replace("://", "/") / "data"
    local_copy.copied(urls, str(tmp_path / "cache"))
    assert re.findall(r"copying \d files", caplog.text) == ["copying 4 files", "copying 2 files"]
    for path in files:
        name = os.path.basename(path)
        assert (folder / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
    storage.write_text(urls[0], "new")
    local_copy.copied(urls, str(tmp_path / "cache"))
    assert (folder / "shard-0").read_text() == "new"


@pytest.mark.parametrize(
    ("file_format", "kind"), [("array_record", "gcs"), ("tfrecord", "s3"), ("tfrecord", None)]
)
def test_the_copy_of_a_data_set_is_the_same_data(tmp_path, file_format, kind, request):
    examples = {
        split: [
            make_imagenet.Example(f"{split}{i}.JPEG", "n01440764", bytes([i]) * 500)
            for i in range(count)
        ]
        for split, count in (("train", 6), ("validation", 4))
    }
    local = make_imagenet.write_tfds(tmp_path / "data", examples, file_format)
    data_dir, version = str(tmp_path / "data"), local
    if kind:
        data_dir = request.getfixturevalue(kind)
        buckets.upload(tmp_path / "data", data_dir)
        version = storage.as_path(data_dir) / "imagenet2012" / "5.1.0"
    there = {split: open_source(NAME, split, data_dir=str(tmp_path / "data")) for split in SPLITS}
    want = {split: [source[i] for i in range(len(source))] for split, source in there.items()}
    options = {"data_dir": data_dir, "copy_dir": str(tmp_path / "cache")}
    open_source(NAME, "test", **options)
    folder = local_copy._place(version, tmp_path / "cache")
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"imagenet2012-validation"}
    copied = {split: open_source(NAME, split, **options) for split in SPLITS}
    for shard in local.glob("*record*"):
        shard.write_bytes(b"")  # nothing is read here from now on
    for split, source in copied.items():
        assert f"2 shards in {folder}" in source.description
        assert source.fingerprints().tolist() == there[split].fingerprints().tolist()
        assert [source[i] for i in range(len(source))] == want[split]
    with pytest.raises(ValueError, match=r"data\.cache: expected empty for data\.source=digits"):
        open_source("digits", "train", copy_dir=str(tmp_path))
