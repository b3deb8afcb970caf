"""Files on disk and in buckets: paths, listing, reading, writing them whole, and local copies."""

from convit_jax.storage.ahead import ReadAhead, Span
from convit_jax.storage.copies import fetch, local_file
from convit_jax.storage.folder_lock import locked
from convit_jax.storage.listing import Version, below, children, is_folder, matching, size, versions
from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file, write_text

__all__ = [
    "ReadAhead",
    "Span",
    "Version",
    "as_path",
    "below",
    "children",
    "fetch",
    "is_bucket",
    "is_folder",
    "local_file",
    "locked",
    "matching",
    "size",
    "versions",
    "whole_file",
    "write_text",
]
