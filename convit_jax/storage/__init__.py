"""Files on disk and in buckets: paths, listing, reading, writing them whole, and local copies."""

from convit_jax.storage.ahead import ReadAhead, Span
from convit_jax.storage.calls import failure, read_bytes
from convit_jax.storage.copies import fetch, local_file
from convit_jax.storage.faults import BucketError, outage_behind
from convit_jax.storage.folder_lock import locked
from convit_jax.storage.folders import local_folder, move_folder
from convit_jax.storage.growing import GrowingFile
from convit_jax.storage.listing import Version, below, children, is_folder, matching, size, versions
from convit_jax.storage.paths import absolute, as_path, is_bucket, make_folder, refuse_pattern
from convit_jax.storage.whole import create_object, whole_file, write_text

__all__ = [
    "BucketError",
    "GrowingFile",
    "ReadAhead",
    "Span",
    "Version",
    "absolute",
    "as_path",
    "below",
    "children",
    "create_object",
    "failure",
    "fetch",
    "is_bucket",
    "is_folder",
    "local_file",
    "local_folder",
    "locked",
    "make_folder",
    "matching",
    "move_folder",
    "outage_behind",
    "read_bytes",
    "refuse_pattern",
    "size",
    "versions",
    "whole_file",
    "write_text",
]
