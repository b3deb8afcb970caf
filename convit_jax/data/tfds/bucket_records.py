"""Random access to the records of TFRecord shards in a bucket.

Every record is a range of bytes of its shard, and the records of a batch are requested together.
"""

import bisect
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import logging
import math
import os

import numpy as np

from convit_jax import storage
from convit_jax.data.tfds import records, stored
from convit_jax.data.threads import in_threads

log = logging.getLogger(__name__)

_PARTS = 16  # most parts of an index
_BLOCK = 2**23  # bytes of a shard that are read at a time to index it


@dataclasses.dataclass(frozen=True, eq=False)
class BucketTFRecords:
    """Records of TFRecord shards in a bucket.

    Attributes:
      paths: the shards.
      ends: number of records up to the end of each shard.
      spans: (n, 2) int64, offset and length in bytes of each payload.
      ahead: reads them.
    """

    paths: tuple[str, ...]
    ends: tuple[int, ...]
    spans: np.ndarray = dataclasses.field(repr=False)
    ahead: storage.ReadAhead = dataclasses.field(default_factory=storage.ReadAhead, repr=False)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> bytes:
        record = self.ahead.read(self._span(index))
        length = int(self.spans[index, 1])
        return records.payload_of(record, length, lambda: self.where(index))

    def request(self, indices: Iterable[int]) -> None:
        self.ahead.request(map(self._span, indices))

    def where(self, index: int) -> str:
        return records.where(self, index)

    def _span(self, index: int) -> storage.Span:
        """Returns the bytes of a whole record."""
        offset, length = (int(x) for x in self.spans[index])
        path = self.paths[bisect.bisect_right(self.ends, index)]
        return storage.Span(path, offset - records.HEADER, offset + length + records.FOOTER)


def open_tfrecords(
    paths: Sequence[str],
    lengths: Sequence[int],
    versions: Sequence[storage.Version],
    cache_dir: str | None,
    cache_name: str,
) -> BucketTFRecords:
    """Indexes TFRecord shards in a bucket, or takes what is stored of the index.

    The index is made in parts, each of which is stored at once. The processes of a run that store
    it in one folder share the work: each begins with other parts, and takes those of the others
    where they are ready. None waits for another one, and a start that was interrupted is continued.

    Args:
      paths: the shards.
      lengths: expected number of records of each shard.
      versions: version of each shard.
      cache_dir: folder that stores the parts, on disk or in a bucket; None stores nothing.
      cache_name: start of the names of their files.

    Raises:
      ValueError: if a shard is truncated, corrupt or has another number of records.
      OSError: if the bucket cannot be read.
    """
    import jax  # late, since worker processes do without it

    gigabytes = sum(version.size for version in versions) / 1e9
    kept = f", and kept in {cache_dir}" if cache_dir else ""
    size = math.ceil(len(paths) / _PARTS)
    parts = [slice(start, start + size) for start in range(0, len(paths), size)]
    first = jax.process_index() * len(parts) // jax.process_count()
    spans = [np.empty((0, 2), np.int64)] * len(parts)

    def build(part: slice) -> stored.Arrays:
        if not any(map(len, spans)):
            log.info(
                "%s: reading %d shards, %.1f GB, to index their records%s",
                os.path.dirname(paths[0]), len(paths), gigabytes, kept,
            )  # fmt: skip
        found = in_threads(
            "Indexing", "shards", index_shard, paths[part], lengths[part], versions[part]
        )
        return {"spans": np.concatenate(found)}

    for number in (*range(first, len(parts)), *range(first)):
        part = parts[number]
        cache = stored.cache_file(cache_dir, f"{cache_name}-{number:02}")
        key = stored.fingerprint(paths[part], versions[part])
        spans[number] = stored.cached(cache, key, functools.partial(build, part))["spans"]
    return BucketTFRecords(
        tuple(paths), tuple(itertools.accumulate(lengths)), np.concatenate(spans)
    )


def index_shard(path: str, expected: int, version: storage.Version) -> np.ndarray:
    """Returns the spans of a TFRecord shard in a bucket, see `records.find_spans`.

    The shard is read once, in large blocks, unless its records are larger than these. A request
    for each record would be slower: it costs as much as some 100 kB.
    """
    ahead = storage.ReadAhead()
    block, start = b"", 0

    def head_at(offset: int) -> bytes:
        nonlocal block, start
        if offset + records.HEADER > start + len(block):
            block, start = b"", offset  # frees the old block first
            block = ahead.read(storage.Span(path, offset, min(offset + _BLOCK, version.size)))
        return block[offset - start : offset - start + records.HEADER]

    return records.find_spans(path, version.size, expected, head_at)
