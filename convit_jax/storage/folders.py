"""Folders on disk and in buckets: written by code that knows no buckets, and moved."""

from collections.abc import Iterator
import contextlib
import pathlib
import shutil
import tempfile

from convit_jax.storage.paths import as_path, is_bucket, opened
from convit_jax.storage.whole import whole_file


@contextlib.contextmanager
def local_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a local folder for code that cannot write into buckets.

    The folder is `path` itself if it is local. Otherwise it is a temporary one, whose files are
    uploaded to `path` when the block succeeds.

    Raises:
      OSError: if a file cannot be uploaded.
    """
    path = as_path(path)
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="convit") as name:
        folder = pathlib.Path(name)
        yield folder
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with whole_file(path / file.relative_to(folder).as_posix()) as unfinished:
                    shutil.copyfile(file, unfinished)


def move_folder(path: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a folder another name. In a bucket its objects are copied, then deleted.

    fsspec would copy the folders in it too, which do not exist in S3.
    """
    if not is_bucket(path):
        path.rename(target)
        return
    file_system, name = opened(path)
    _, new = opened(target)
    for found in file_system.find(name):
        file_system.cp_file(found, new + found.removeprefix(name))
    file_system.rm(name, recursive=True)
