"""Finding and classifying image files."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import glob
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from convit_jax import storage
from convit_jax.data.folders.listing import EXTENSIONS, walk
from convit_jax.predict.predictor import Prediction, Predictor


def find_images(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Finds the image files that the arguments of a command line name.

    Args:
      arguments: files, with any extension; folders, searched at any depth for files that have one
        of the `EXTENSIONS` and are not hidden; or patterns such as "photos/*.jpg" and
        "photos/**/*.jpg". Each of them on a disk or in a bucket (gs://BUCKET/NAME).

    Returns:
      The paths in the order of the arguments, sorted within each argument and without repetition;
      and {argument: reason} for the arguments that name no image.

    Raises:
      BucketError: if a bucket cannot be used: it would fail for the other arguments too.
    """
    paths, reasons = [], {}
    for argument in arguments:
        try:
            found, reason = _named_by(argument)
        except storage.BucketError:
            raise
        except (OSError, ValueError) as error:  # the folder, or one in it, cannot be read
            found, reason = [], str(error)
        if not found:
            reasons[argument] = reason
        paths += sorted(found)
    return list(dict.fromkeys(paths)), reasons


def path_of(name: str) -> pathlib.Path:
    """Returns the path of a file on a disk or in a bucket; a "~" in a local name is kept."""
    return storage.as_path(name) if storage.is_bucket(name) else pathlib.Path(name)


def _named_by(argument: str) -> tuple[list[str], str]:
    """Returns the image files that an argument names, and the reason if there are none."""
    path = path_of(argument)
    if path.is_dir():
        found = [os.path.join(argument, name) for name in walk(argument).images]
        return found, f"no images in this folder ({', '.join(EXTENSIONS)})"
    if glob.has_magic(argument) and not path.exists():
        look = storage.matching if storage.is_bucket(argument) else _matching
        return look(argument), "no file matches this pattern"
    return [argument], ""  # a missing file is reported when it is read


def _matching(pattern: str) -> list[str]:
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def predict_files(
    predictor: Predictor,
    paths: Iterable[str],
    count: int = 5,
    watch: Callable[[list[str], np.ndarray], None] | None = None,
) -> Iterator[tuple[str, list[Prediction] | str]]:
    """Classifies image files, which threads read and decode ahead of the model.

    At most three batches of pixels are in memory, however many files there are.

    Args:
      predictor: the classifier.
      paths: the files.
      count: number of classes for each image.
      watch: called with the files and the pixels of each batch before they are yielded: a list,
        and (batch_size, height, width, channels) uint8 that begins with the images of the list.

    Yields:
      (path, predictions), or (path, reason) if the file cannot be read, in the order of the paths.

    Raises:
      BucketError: if a bucket cannot be used, after the files before have been yielded.
    """

    def read(path: str) -> np.ndarray | str | storage.BucketError:
        try:
            return predictor.pixels(path_of(path).read_bytes())
        except storage.BucketError as error:
            return error
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    def classified(files: list[tuple[str, np.ndarray | str]]) -> Iterator[tuple[str, Any]]:
        good = [(path, image) for path, image in files if not isinstance(image, str)]
        found: Iterator[list[Prediction]] = iter(())
        if good:
            images = [image for _, image in good]
            found = iter(predictor.top(images, count))
            if watch is not None:
                watch([path for path, _ in good], predictor.batch(images))
        for path, image in files:
            yield path, image if isinstance(image, str) else next(found)

    files: list[tuple[str, np.ndarray | str]] = []
    for path, image in _ahead(read, paths, 2 * predictor.batch_size):
        if isinstance(image, storage.BucketError):
            yield from classified(files)
            raise image
        files.append((path, image))
        if sum(not isinstance(image, str) for _, image in files) == predictor.batch_size:
            yield from classified(files)
            files = []
    yield from classified(files)


def _ahead(function: Any, items: Iterable[str], count: int) -> Iterator[tuple[str, Any]]:
    """Yields (item, function(item)) in order; threads compute up to `count` items ahead."""
    items = iter(items)
    pool = futures.ThreadPoolExecutor()
    try:
        running = collections.deque(
            (item, pool.submit(function, item)) for item in itertools.islice(items, count)
        )
        while running:
            item, future = running.popleft()
            running.extend((x, pool.submit(function, x)) for x in itertools.islice(items, 1))
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
