"""Files on disk and in buckets: their paths, and writing them whole or not at all."""

from convit_jax.storage.folders import local_folder, move_folder
from convit_jax.storage.growing import GrowingFile
from convit_jax.storage.paths import absolute, as_path, is_bucket, make_folder
from convit_jax.storage.whole import whole_file, write_text

__all__ = [
    "GrowingFile",
    "absolute",
    "as_path",
    "is_bucket",
    "local_folder",
    "make_folder",
    "move_folder",
    "whole_file",
    "write_text",
]
