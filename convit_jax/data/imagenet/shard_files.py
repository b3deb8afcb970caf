"""Shards of records, written as tfds writes them: ArrayRecord, or TFRecord."""

import os
import pathlib
import struct
from typing import Any

from convit_jax.data.tfds import records


def open_writer(path: pathlib.Path, file_format: str) -> Any:
    """Returns an object with `write(record)` and `close()`.

    Args:
      path: the shard, on a disk.
      file_format: "array_record" or "tfrecord".
    """
    if file_format == "tfrecord":
        return _TFRecordWriter(path)
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordWriter(str(path), "group_size:1")  # as tfds


class _TFRecordWriter:
    """Writes records with their lengths and checksums, see `convit_jax.data.tfds.records`."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("wb")

    def write(self, record: bytes) -> None:
        for part in (struct.pack("<Q", len(record)), record):
            self._file.write(part)
            self._file.write(struct.pack("<I", records.masked_crc32c(part)))

    def close(self) -> None:
        self._file.close()


def is_whole(path: pathlib.Path, count: int, file_format: str) -> bool:
    """Returns whether a shard on a disk is there, with its number of records, and not cut off."""
    if file_format == "tfrecord":
        try:
            return len(records.index_shard(os.fspath(path), count)) == count
        except (ValueError, OSError):
            return False
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()  # raises if the file is damaged
    except (RuntimeError, ValueError, OSError, IndexError):
        return False
    return found == count
