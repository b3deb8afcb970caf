"""Files on disk and in buckets: their paths, writing them whole or not at all, and local copies."""

from convit_jax.storage.copies import Entry, entry, fetch, files_in, local_file, matching
from convit_jax.storage.folder_lock import locked
from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file, write_text

__all__ = [
    "Entry",
    "as_path",
    "entry",
    "fetch",
    "files_in",
    "is_bucket",
    "local_file",
    "locked",
    "matching",
    "whole_file",
    "write_text",
]
