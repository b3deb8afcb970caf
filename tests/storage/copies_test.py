"""Local copies of files and objects are whole and checked."""

import contextlib
import errno
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
    file_system, name = copies.opened(path)
    error = pytest.raises(OSError, match=rf"{re.escape(path)}: copied 2 times .* not ")
    for times, ends in ((1, contextlib.nullcontext()), (2, error)):
        copy.write_text("old")
        damaged = damaging(file_system, times)
        monkeypatch.setattr(copies, "opened", lambda path: (damaged, name))  # noqa: B023
        with ends:
            storage.fetch(path, copy)
        assert copy.read_text() == ("content" if times == 1 else "old")
        assert list(tmp_path.iterdir()) == [copy]


def upload_in_parts(file_system, name, contents):
    """Uploads an S3 object in parts of any sizes."""
    bucket, key, _ = file_system.split_path(name)
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = file_system.call_s3("create_multipart_upload", **place)["UploadId"]
    parts = []
    for number, body in enumerate(contents, start=1):
        sent = file_system.call_s3("upload_part", **place, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    file_system.call_s3("complete_multipart_upload", **place, MultipartUpload={"Parts": parts})


def test_copies_of_objects_uploaded_in_unequal_parts_are_checked(s3, tmp_path, monkeypatch):
    file_system, name = copies.opened(f"{s3}/file")
    sizes = (6 * 2**20, 5 * 2**20, 10)
    upload_in_parts(file_system, name, [bytes([n]) * size for n, size in enumerate(sizes)])
    storage.fetch(f"{s3}/file", tmp_path / "copy")
    info = file_system.info(name)
    checksum = checksums.of_object(file_system, name, info)
    assert checksum.parts == sizes
    with (tmp_path / "copy").open("r+b") as file:
        file.write(b"!")
    assert "not" in copies._difference(tmp_path / "copy", sum(sizes), checksum)

    # A service may not know the numbers of parts. One that is out of order is no reason to give up
    # the check.
    answer = file_system._call_s3

    async def refusing(method, **options):
        if "PartNumber" not in options:
            return await answer(method, **options)
        status = statuses.pop()
        if status == 416:
            raise OSError(errno.EINVAL, "Requested Range Not Satisfiable")
        error = storage.BucketError("refused")
        error.status = status
        raise error

    async def ignoring(method, PartNumber=None, **options):
        return await answer(method, **options)

    monkeypatch.setattr(file_system, "_call_s3", ignoring)
    assert checksums.of_object(file_system, name, info) is None
    monkeypatch.setattr(file_system, "_call_s3", refusing)
    for status in (416, 501):
        statuses = [status] * 3
        assert checksums.of_object(file_system, name, info) is None
    for status in (403, 503, None):
        statuses = [status] * 3
        with pytest.raises(storage.BucketError, match="refused"):
            checksums.of_object(file_system, name, info)
