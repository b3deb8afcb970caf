"""Calls of fsspec's file systems, which all run in one thread that waits for many answers."""

import asyncio
from concurrent.futures import Future
import os
from typing import Any

from convit_jax.storage.faults import BucketError, answered, broken
from convit_jax.storage.paths import as_path, is_bucket, opened


def begin(path: str, method: str, **options: Any) -> Future[Any]:
    """Calls a method of the file system of an object in the background.

    All calls run in fsspec's event loop, so a process has one file system and one pool of
    connections for each kind of bucket.

    Args:
      path: gs://BUCKET/NAME or s3://BUCKET/NAME.
      method: name of a coroutine of the file system, which takes the path.
      **options: further arguments.
    """
    as_path(path)  # sets up the package that reads such buckets
    import fsspec

    async def call() -> Any:
        file_system, name = opened(path)
        return await getattr(file_system, method)(name, **options)

    return asyncio.run_coroutine_threadsafe(call(), fsspec.asyn.get_loop())


def result(answer: Future[Any], path: str) -> Any:
    """Waits for the answer of `begin`.

    Raises:
      OSError: if the call failed; the message names `path`.
    """
    try:
        return answer.result()
    except OSError as error:
        if path in str(error):
            raise
        raise type(error)(f"{path}: {error or type(error).__name__}") from error
    except Exception as error:  # of the libraries' own kinds
        raise OSError(f"{path}: cannot be read: {error or type(error).__name__}") from error


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the content of a file or object that another process may replace meanwhile.

    An object comes by one request. `Path.read_bytes` asks for its size first: if the object is
    replaced before the second request, the content is cut, or S3 refuses.

    Raises:
      OSError: if it cannot be read; FileNotFoundError if there is none.
    """
    if not is_bucket(path):
        return as_path(path).read_bytes()
    return result(begin(os.fspath(path), "_cat_file", max_concurrency=1), os.fspath(path))


def failure(path: str, status: int | None, text: str, tries: int = 1) -> BucketError:
    """Returns the error of a request to a bucket that another library has made.

    Args:
      path: URL of the object.
      status: HTTP status; None if there was no answer.
      text: what the library says.
      tries: number of its requests.
    """
    fault = broken(text) if status is None else answered(status, text)
    file_system, _ = opened(path)
    return file_system.explain(path, fault, tries)
