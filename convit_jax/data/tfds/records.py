"""Random access to the records of a prepared tfds data set, without TensorFlow.

A TFRecord shard is a sequence of records, each [length: uint64][checksum of the length: uint32]
[payload][checksum of the payload: uint32], little-endian. It has no index, so one is built by
following the lengths through the file once. ArrayRecord shards contain an index.
"""

import bisect
from collections.abc import Callable, Collection, Iterable, Sequence
import dataclasses
import functools
import itertools
import os
from typing import Any, Protocol

import google_crc32c
import numpy as np

from convit_jax import storage
from convit_jax.data import corrupt
from convit_jax.data.tfds import stored
from convit_jax.data.threads import in_threads

HEADER = 12  # bytes before the payload of a TFRecord
FOOTER = 4  # bytes after the payload of a TFRecord
# In array_record's errors about one record. Others are about the shard or the machine.
_DAMAGE = ("Corrupted Riegeli", "Truncated Riegeli", "Input/output error")
MAX_OPEN_FILES = 65536  # limit to ask the system for, since all ArrayRecord shards are held open


class Records(Protocol):
    """The payloads of a split, in the order of its shards."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def ends(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def request(self, indices: Iterable[int]) -> None:
        """Begins to read records that will be asked for soon, if they are in a bucket."""
        ...

    def where(self, index: int) -> str:
        """Returns the shard of a record and its number there, for messages."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TFRecords:
    """Records of TFRecord shards.

    Every read opens its shard again, which takes some microseconds. ImageNet has more shards than a
    process may hold open by default, and closed files need no care when the object is pickled.

    Attributes:
      paths: the shards.
      ends: number of records up to the end of each shard.
      spans: (n, 2) int64, offset and length in bytes of each payload.
    """

    paths: tuple[str, ...]
    ends: tuple[int, ...]
    spans: np.ndarray = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> bytes:
        offset, length = (int(x) for x in self.spans[index])
        try:
            with open(self.paths[bisect.bisect_right(self.ends, index)], "rb", buffering=0) as file:
                record = os.pread(file.fileno(), HEADER + length + FOOTER, offset - HEADER)
        except OSError as error:
            text = f"{self.where(index)}: {error.strerror or error}"
            if corrupt.is_damage(error):
                raise corrupt.CorruptImageError(text) from error
            raise type(error)(text) from error
        return payload_of(record, length, lambda: self.where(index))

    def request(self, indices: Iterable[int]) -> None:
        """Does nothing, since a disk answers at once."""

    def where(self, index: int) -> str:
        return where(self, index)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Records of ArrayRecord shards; each process opens a shard when it first reads from it.

    Attributes:
      paths: the shards.
      ends: number of records up to the end of each shard.
    """

    paths: tuple[str, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._reader[index]
        except (IndexError, RuntimeError, ValueError, OSError) as error:
            damaged = any(sign in str(error) for sign in _DAMAGE)
            kind = corrupt.CorruptImageError if damaged else ValueError
            raise kind(f"{self.where(index)}: {error}") from error

    def request(self, indices: Iterable[int]) -> None:
        """Does nothing, since a disk answers at once."""

    def where(self, index: int) -> str:
        return where(self, index)

    @functools.cached_property
    def _reader(self) -> Any:
        from array_record.python import array_record_data_source  # late: it defines absl flags

        _allow_open_files()
        lengths = np.diff(self.ends, prepend=0)
        # A path with the number of records lets the reader open the shard at the first read.
        spans = [f"{path}[0:{n}]" for path, n in zip(self.paths, lengths, strict=True)]
        return array_record_data_source.ArrayRecordDataSource(spans)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_reader"}


def payload_of(record: bytes, length: int, name: Callable[[], str]) -> bytes:
    """Returns the payload of a whole TFRecord, with its lengths and checksums.

    Args:
      record: the bytes that were read.
      length: number of bytes of the payload, by the index.
      name: returns the name of the record, for messages.

    Raises:
      ValueError: if the record does not fit the index.
      CorruptImageError: if the payload fails its checksum.
    """
    whole = HEADER + length + FOOTER
    if len(record) < whole or int.from_bytes(record[:8], "little") != length:
        raise ValueError(
            f"{name()}: expected {length:,} bytes, which are missing: the shard was changed since "
            f"it was indexed; start again"
        )
    payload = record[HEADER:-FOOTER]
    if masked_crc32c(payload) != int.from_bytes(record[-FOOTER:], "little"):
        raise corrupt.CorruptImageError(f"{name()}: its {length:,} bytes fail their checksum")
    return payload


def where(records: Records, index: int) -> str:
    """Returns the shard of a record and its number there, for messages."""
    shard = bisect.bisect_right(records.ends, index)
    number = index - (records.ends[shard - 1] if shard else 0)
    return f"{records.paths[shard]}, record {number}"


def _allow_open_files() -> None:
    """Raises this process's limit of open files as far as allowed: ImageNet has 1,024 shards."""
    try:
        import resource
    except ImportError:  # exists on Unix only
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_tfrecords(
    paths: Collection[str],
    lengths: Collection[int],
    versions: Collection[storage.Version],
    cache: str | None = None,
) -> TFRecords:
    """Indexes TFRecord shards.

    Args:
      paths: the shards.
      lengths: expected number of records of each shard.
      versions: version of each shard.
      cache: .npz file that stores the index; it is used until a shard changes. None stores nothing.

    Raises:
      ValueError: if a shard is truncated, corrupt or has another number of records.
    """

    def build() -> stored.Arrays:
        spans = in_threads("Indexing", "shards", index_shard, paths, lengths)
        return {"spans": np.concatenate(spans)}

    spans = stored.cached(cache, stored.fingerprint(paths, versions), build)["spans"]
    return TFRecords(tuple(paths), tuple(itertools.accumulate(lengths)), spans)


def open_array_records(paths: Sequence[str], lengths: Collection[int]) -> ArrayRecords:
    """Opens ArrayRecord shards and checks the number of records of each.

    Args:
      paths: the shards.
      lengths: expected number of records of each shard.

    Raises:
      ValueError: if a shard cannot be read or has another number of records than expected, or if
        the shards are in a bucket.
    """
    if storage.is_bucket(paths[0]):
        # array_record opens gs:// by gRPC, and waits for ever where that is not let through.
        raise ValueError(
            f"{os.path.dirname(paths[0])}: ArrayRecord files in a bucket are read through a copy "
            f"on a local disk: set --config.data.cache=PATH, which copies them once. TFRecord "
            f"files need no copy"
        )
    in_threads("Checking", "shards", _check_array_record, paths, lengths)
    return ArrayRecords(tuple(paths), tuple(itertools.accumulate(lengths)))


def _check_array_record(path: str, expected: int) -> None:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        try:
            count = reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole ArrayRecord file, truncated or corrupt ({error}); copy or "
            f"prepare it again"
        ) from error
    _check_count(path, count, expected)


def index_shard(path: str, expected: int) -> np.ndarray:
    """Returns the spans of a TFRecord shard on a disk, see `find_spans`."""
    with open(path, "rb", buffering=0) as file:
        read = functools.partial(os.pread, file.fileno(), HEADER)
        return find_spans(path, os.path.getsize(path), expected, read)


def find_spans(path: str, size: int, expected: int, head_at: Callable[[int], bytes]) -> np.ndarray:
    """Returns the offset and length in bytes of every payload of a TFRecord shard: (n, 2) int64.

    Args:
      path: the shard, for messages.
      size: its number of bytes.
      expected: its number of records.
      head_at: returns the HEADER bytes at an offset, or fewer at the end of the shard.

    Raises:
      ValueError: if a length fails its checksum, if the file ends within a record, or if the number
        of records is not `expected`.
    """
    heads: list[bytes] = []
    offset = 0
    # One record more than expected is enough to know that there are too many.
    while offset < size and len(heads) <= expected:
        heads.append(head_at(offset))
        offset += HEADER + int.from_bytes(heads[-1][:8], "little") + FOOTER
    again = "copy or prepare it again"
    cut = f"{path}, record {len(heads) - 1}: the shard is truncated, at {size:,} bytes; {again}"
    if heads and len(heads[-1]) < HEADER:
        raise ValueError(cut)
    for number, head in enumerate(heads):
        if masked_crc32c(head[:8]) != int.from_bytes(head[8:], "little"):
            raise ValueError(
                f"{path}, record {number}: its length fails its checksum: corrupt, or not a "
                f"TFRecord file; {again}"
            )
    if len(heads) <= expected and offset > size:
        raise ValueError(cut)
    _check_count(path, len(heads), expected)
    lengths = np.array([int.from_bytes(head[:8], "little") for head in heads], np.int64)
    ends = np.cumsum(lengths + (HEADER + FOOTER))
    return np.stack([ends - FOOTER - lengths, lengths], axis=1)


def _check_count(path: str, count: int, expected: int) -> None:
    if count != expected:
        more = "more" if count > expected else f"{count:,}"
        raise ValueError(
            f"{path}: expected {expected:,} records, by dataset_info.json beside it, got {more}: "
            f"truncated, or of another data set; copy or prepare it again"
        )


def masked_crc32c(data: bytes) -> int:
    """Returns TFRecord's checksum: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
