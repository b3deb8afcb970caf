"""Files on disk and in buckets: their paths, and writing them whole or not at all."""

from convit_jax.storage.faults import BucketError
from convit_jax.storage.paths import as_path, is_bucket
from convit_jax.storage.whole import whole_file, write_text

__all__ = ["BucketError", "as_path", "is_bucket", "whole_file", "write_text"]
