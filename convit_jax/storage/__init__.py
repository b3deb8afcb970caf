"""Files on disk and in buckets: their paths, listing and reading many, and writing them whole."""

from convit_jax.storage.ahead import ReadAhead, Span
from convit_jax.storage.listing import Version, below, children, is_folder, versions
from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file, write_text

__all__ = [
    "ReadAhead",
    "Span",
    "Version",
    "as_path",
    "below",
    "children",
    "is_bucket",
    "is_folder",
    "versions",
    "whole_file",
    "write_text",
]
