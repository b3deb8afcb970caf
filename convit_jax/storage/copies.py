"""Copies of files on the local disk, checked against what the bucket says of the object."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import tempfile
import zlib

from convit_jax.storage.checksums import Checksum, of_file, of_object
from convit_jax.storage.listing import Version, version_of
from convit_jax.storage.paths import as_path, is_bucket, opened
from convit_jax.storage.whole import whole_file

_TRIES = 2  # times that a file is copied if the copy differs
_BLOCK = 2**22  # bytes read at a time


@contextlib.contextmanager
def local_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields the path of a local file with the content of `path`.

    That is `path` itself on a disk. An object in a bucket is copied to a temporary file, which is
    deleted at the end of the block.

    Raises:
      OSError: see `fetch`.
    """
    path = as_path(path)
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="convit") as folder:
        copy = pathlib.Path(folder, path.name)
        fetch(path, copy)
        yield copy


def fetch(source: str | os.PathLike, copy: pathlib.Path) -> None:
    """Copies a file or an object to the local disk. The copy appears when it is whole and checked.

    Its size and checksum are compared with those that the bucket keeps: CRC-32C on gs://, the ETag
    on s3://. Those of the copy of a file are compared with those of the bytes that were read. Only
    the size of an S3 object is compared if it is encrypted with a key of KMS or of the customer, or
    if the service does not tell the sizes of the parts in which it was uploaded. The copy has the
    modification time of the source.

    Args:
      source: the file or object to copy.
      copy: the local file to write.

    Raises:
      OSError: if the source cannot be read or the copy cannot be written, or if the copy has
        repeatedly other bytes than the source.
    """
    source = as_path(source)
    read, there = (_from_bucket if is_bucket(source) else _from_disk)(source)
    try:
        with whole_file(copy) as unfinished:
            for _ in range(_TRIES):
                expected = read(unfinished)
                wrong = _difference(unfinished, there.size, expected)
                if not wrong:
                    os.utime(unfinished, (there.modified, there.modified))
                    return
            raise _DifferentError(wrong)
    except _DifferentError as error:
        raise OSError(f"{source}: copied {_TRIES} times to {copy.parent}, with {error}") from None


class _DifferentError(Exception):
    """A copy differs from its source. No OSError, so that `whole_file` leaves its message alone."""


_Read = Callable[[pathlib.Path], Checksum | None]  # copies a file, and returns its checksum


def _from_bucket(source: pathlib.Path) -> tuple[_Read, Version]:
    """Returns a function that copies an object, with the bucket's checksum, and its version."""
    file_system, name = opened(source)
    info = file_system.info(name)
    checksum = of_object(file_system, name, info)

    def read(copy: pathlib.Path) -> Checksum | None:
        file_system.get_file(name, os.fspath(copy))
        return checksum

    return read, version_of(info)


def _from_disk(source: pathlib.Path) -> tuple[_Read, Version]:
    """Returns a function that copies a file, with the checksum of what it read; its version."""

    def read(copy: pathlib.Path) -> Checksum:
        crc = 0
        with source.open("rb") as file, copy.open("wb") as out:
            while block := file.read(_BLOCK):
                crc = zlib.crc32(block, crc)
                out.write(block)
        return Checksum("crc32", str(crc))

    stat = source.stat()
    return read, Version(stat.st_size, "", int(stat.st_mtime))


def _difference(path: pathlib.Path, size: int, expected: Checksum | None) -> str:
    """Says how a file differs from what is expected; empty if it does not."""
    found = path.stat().st_size
    if found != size:
        return f"{found:,} bytes instead of {size:,}"
    if expected is None:
        return ""
    value = of_file(path, expected)
    return "" if value == expected.value else f"{expected.kind} {value}, not {expected.value}"
