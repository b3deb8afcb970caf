"""Reads and transforms images one after another, and gathers them into arrays."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import logging
from typing import Any

import numpy as np

from convit_jax.data.corrupt import CorruptImageError, ImageError
from convit_jax.data.source import Source

log = logging.getLogger(__name__)

Transform = Callable[..., np.ndarray]


def transformed(
    source: Source, index: int, transform: Transform, *args: Any
) -> tuple[np.ndarray, int]:
    """Returns a transformed image and its label; errors of the transform name the image."""
    example = source[index]
    with naming(example["name"]):
        return transform(example["image"], *args), example["label"]


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of the image into errors about it."""
    try:
        yield
    except CorruptImageError as error:
        raise CorruptImageError(f"{name}: {error}") from None
    except ValueError as error:  # the image does not fit the configuration
        raise ImageError(f"{name}: {error}") from error


@functools.cache
def say_once(failure: str) -> None:
    """Logs a corrupt image, once in each process however often it is drawn."""
    log.warning("corrupt, so it is skipped: %s", failure)


def gather(examples: Iterable[tuple], count: int) -> tuple[np.ndarray, list[tuple]]:
    """Collects `count` tuples (image, value, ...) into one array of images and a tuple per value.

    Each image is copied as soon as it is made: it is still in the processor's cache then, and its
    own memory is freed at once.
    """
    rest = []
    for number, (image, *values) in enumerate(examples):
        if not number:
            images = np.empty((count, *image.shape), image.dtype)
        elif image.shape != images.shape[1:]:
            shape = images.shape[1:]
            raise ValueError(f"images of a batch: expected all {shape}, got {image.shape}")
        images[number] = image
        rest.append(values)
    return images, list(zip(*rest, strict=True))
