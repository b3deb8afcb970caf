"""Checksums of files, and those that buckets keep of their objects."""

import base64
import functools
import hashlib
import itertools
import pathlib
from typing import Any, NamedTuple
import zlib

_BLOCK = 2**22  # bytes read at a time


class Checksum(NamedTuple):
    """The checksum of a file.

    Attributes:
      kind: "crc32c", "md5" or "crc32".
      value: the checksum, as the bucket writes it.
      part: number of bytes of each part of an S3 object that was uploaded in parts, whose value is
        the MD5 of the MD5s of the parts; 0 if it has no parts.
    """

    kind: str
    value: str
    part: int = 0


def of_object(file_system: Any, name: str, info: dict[str, Any]) -> Checksum | None:
    """Returns the checksum that the bucket keeps of an object; None if it keeps none."""
    if "crc32c" in info:
        return Checksum("crc32c", info["crc32c"])
    if "ETag" not in info:
        return None
    bucket, key, _ = file_system.split_path(name)
    try:
        head = file_system.call_s3("head_object", Bucket=bucket, Key=key, PartNumber=1)
    except OSError:  # some services that speak S3's protocol know no parts
        return None
    if head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head:
        return None  # its ETag is no checksum
    etag = info["ETag"].strip('"')
    return Checksum("md5", etag, head["ContentLength"] if "-" in etag else 0)


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
        if not like.part:
            md5 = functools.partial(hashlib.md5, usedforsecurity=False)
            return hashlib.file_digest(file, md5).hexdigest()
        parts = itertools.takewhile(len, (file.read(like.part) for _ in itertools.count()))
        digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in parts]
        total = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
        return f"{total}-{len(digests)}"
