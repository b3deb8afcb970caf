"""Files on disk and in buckets: their paths, writing them whole or not at all, and local copies."""

from convit_jax.storage.copies import Entry, fetch, files_in, local_file
from convit_jax.storage.folder_lock import locked
from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file, write_text

__all__ = [
    "Entry",
    "as_path",
    "fetch",
    "files_in",
    "is_bucket",
    "local_file",
    "locked",
    "whole_file",
    "write_text",
]
