"""Checksums of files, and those that buckets keep of their objects."""

import asyncio
import base64
import errno
import functools
import hashlib
import pathlib
import re
from typing import Any, NamedTuple
import zlib

from convit_jax.storage.faults import BucketError

_BLOCK = 2**22  # bytes read at a time
# Answers of services that speak S3's protocol but do not know the numbers of parts.
_NO_PARTS = (400, 405, 501)


class Checksum(NamedTuple):
    """The checksum of a file.

    Attributes:
      kind: "crc32c", "md5" or "crc32".
      value: the checksum, as the bucket writes it.
      parts: number of bytes of each part of an S3 object that was uploaded in parts, whose value is
        the MD5 of the MD5s of the parts; empty if it has no parts.
    """

    kind: str
    value: str
    parts: tuple[int, ...] = ()


def of_object(file_system: Any, name: str, info: dict[str, Any]) -> Checksum | None:
    """Returns the checksum that the bucket keeps of an object; None if it keeps none.

    Raises:
      OSError: if the bucket cannot be asked.
    """
    if "crc32c" in info:
        return Checksum("crc32c", info["crc32c"])
    if "ETag" not in info:
        return None
    bucket, key, _ = file_system.split_path(name)
    head = file_system.call_s3("head_object", Bucket=bucket, Key=key)
    if head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head:
        return None  # its ETag is no checksum
    etag = info["ETag"].strip('"')
    _, in_parts, count = etag.partition("-")
    if not in_parts:
        return Checksum("md5", etag)
    if not re.fullmatch("[0-9]+", count):
        return None  # an ETag of another kind
    try:
        parts = _sizes_of_parts(file_system, bucket, key, int(count))
    except OSError as error:
        no_such_part = error.errno == errno.EINVAL  # what s3fs makes of 416
        if no_such_part or (isinstance(error, BucketError) and error.status in _NO_PARTS):
            return None
        raise
    # Some services ignore the number, and answer with the size of the object.
    return Checksum("md5", etag, parts) if sum(parts) == info["size"] else None


def _sizes_of_parts(file_system: Any, bucket: str, key: str, count: int) -> tuple[int, ...]:
    """Asks S3 for the number of bytes of each part of an object."""
    import fsspec

    async def ask() -> list[dict[str, Any]]:
        heads = (
            file_system._call_s3("head_object", Bucket=bucket, Key=key, PartNumber=number)
            for number in range(1, count + 1)
        )
        return await asyncio.gather(*heads)

    heads = fsspec.asyn.sync(file_system.loop, ask)
    return tuple(head["ContentLength"] for head in heads)


def of_file(path: pathlib.Path, like: Checksum) -> str:
    """Returns the checksum of a file, of the kind of another checksum and written like it."""
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(_BLOCK), b"")
        if like.kind == "crc32":
            crc = 0
            for block in blocks:
                crc = zlib.crc32(block, crc)
            return str(crc)
        if like.kind == "crc32c":
            import google_crc32c

            crc = 0
            for block in blocks:
                crc = google_crc32c.extend(crc, block)
            return base64.b64encode(crc.to_bytes(4, "big")).decode()
        if not like.parts:
            md5 = functools.partial(hashlib.md5, usedforsecurity=False)
            return hashlib.file_digest(file, md5).hexdigest()
        digests = [
            hashlib.md5(file.read(size), usedforsecurity=False).digest() for size in like.parts
        ]
        total = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
        return f"{total}-{len(digests)}"
