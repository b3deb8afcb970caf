"""Local copies of files and objects are whole and checked."""

import contextlib
import re

import pytest

from convit_jax import storage
from convit_jax.storage import checksums, copies


def damaging(file_system, times):
    """A file system that changes a byte in the first copies that it makes."""

    class Damaging:
        def __getattr__(self, name):
            return getattr(file_system, name)

        def get_file(self, name, copy):
            nonlocal times
            file_system.get_file(name, copy)
            times -= 1
            if times >= 0:
                with open(copy, "r+b") as file:
                    file.write(b"!")

    return Damaging()


def test_copies_of_objects_are_checked(bucket, tmp_path, monkeypatch):
    path, copy = f"{bucket}/folder/file", tmp_path / "copy"
    storage.write_text(path, "content")
    storage.fetch(path, copy)
    there, copied = storage.versions([path, str(copy)])
    assert copy.read_text() == "content"
    assert (there.size, there.modified) == (copied.size, copied.modified)
    file_system, name = copies._opened(path)
    error = pytest.raises(OSError, match=rf"{re.escape(path)}: copied 2 times .* not ")
    for times, ends in ((1, contextlib.nullcontext()), (2, error)):
        copy.write_text("old")
        damaged = damaging(file_system, times)
        monkeypatch.setattr(copies, "_opened", lambda path: (damaged, name))  # noqa: B023
        with ends:
            storage.fetch(path, copy)
        assert copy.read_text() == ("content" if times == 1 else "old")
        assert list(tmp_path.iterdir()) == [copy]


def test_copies_of_objects_uploaded_in_parts_are_checked(s3, tmp_path):
    (tmp_path / "file").write_bytes(bytes(11 * 2**20))
    file_system, name = copies._opened(f"{s3}/file")
    file_system.put_file(str(tmp_path / "file"), name, chunksize=5 * 2**20)
    assert file_system.info(name)["ETag"].endswith('-3"')
    storage.fetch(f"{s3}/file", tmp_path / "copy")
    checksum = checksums.of_object(file_system, name, file_system.info(name))
    assert checksum.part == 5 * 2**20
    with (tmp_path / "copy").open("r+b") as file:
        assert not copies._difference(tmp_path / "copy", 11 * 2**20, checksum)
        file.write(b"!")
        file.flush()
        assert "not" in copies._difference(tmp_path / "copy", 11 * 2**20, checksum)
