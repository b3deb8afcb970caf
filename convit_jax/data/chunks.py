"""The order of the images, and how they become batches.

Training images form an endless stream, and a draw is the number of an image in it. The seed and the
draw alone decide which image is read and how it is augmented. So there is no data state to save: a
run started at any step, with any number of workers or processes, sees the same batches.

The stream is cut into chunks. One worker makes a chunk from its position alone, and a batch is a
whole number of chunks. Every process reads its own contiguous share of each global batch.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import logging
import math
from typing import Any

import grain
import numpy as np

from convit_jax.data.corrupt import MEND, CorruptImageError, ImageError
from convit_jax.data.source import Source

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Transform = Callable[..., np.ndarray]

_CHUNK = 64  # largest number of images that a worker makes, and holds in memory, at a time
_ENDLESS = 2**40  # number of chunks in the endless stream, since a sequence needs a length
_TRIES = 100  # most images tried in place of a corrupt one


def draws_per_epoch(num_images: int, repeats: int) -> int:
    """Returns the number of images drawn in an epoch.

    Without repeated augmentation an epoch draws every image once. With it, an epoch has about as
    many draws, cut to a multiple of 256 as in DeiT's RASampler: with three repeats it draws a third
    of the images three times each (Hoffer et al. 2020, arXiv:1901.09335; DeiT, section 6).

    Args:
      num_images: number of training images.
      repeats: draws of an image in a row; 1 is no repeated augmentation.
    """
    return num_images // 256 * 256 or num_images if repeats > 1 else num_images


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every global batch that one process reads.

    Attributes:
      batch_size: number of images in the global batch, a multiple of `count`.
      index: number of this process, from 0.
      count: number of processes.
    """

    batch_size: int
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.count:
            raise ValueError(
                f"batch size: expected a multiple of the {self.count} processes, "
                f"got {self.batch_size}"
            )

    @property
    def size(self) -> int:
        """Number of images of a batch that this process reads."""
        return self.batch_size // self.count

    @functools.cached_property
    def chunk(self) -> int:
        """Number of images in a chunk: the largest divisor of `size` up to _CHUNK."""
        return max(d for d in range(1, min(_CHUNK, self.size) + 1) if self.size % d == 0)

    @property
    def chunks(self) -> int:
        """Number of chunks of a batch that this process reads."""
        return self.size // self.chunk

    def positions(self, chunk: int) -> range:
        """Returns the positions in the global stream of the images of one chunk of this process."""
        step, part = divmod(chunk, self.chunks)
        start = step * self.batch_size + self.index * self.size + part * self.chunk
        return range(start, start + self.chunk)


@dataclasses.dataclass(frozen=True)
class TrainChunks:
    """The chunks of training that this process reads, as a sequence.

    Attributes:
      source: the images.
      transform: (image, rng) -> uint8 (height, width, channels).
      share: the part of every global batch that this process reads.
      seed: seed of the order and of the augmentation.
      repeats: draws of an image in a row; 1 is no repeated augmentation.
      skip_corrupt: whether the next image of the epoch replaces a corrupt one.
    """

    source: Source
    transform: Transform
    share: Share
    seed: int
    repeats: int = 1
    skip_corrupt: bool = False

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, chunk: int) -> Batch:
        """Returns "image" (chunk, h, w, c) uint8, "label" and "skipped" (chunk,) int32.

        "skipped" is the number of corrupt images that each image replaces.

        Raises:
          CorruptImageError: if an image is corrupt and none may replace it.
          ImageError: if an image does not fit the transform.
        """
        draws = map(self._draw, self.share.positions(chunk))
        images, (labels, skipped) = _gather(draws, self.share.chunk)
        return {
            "image": images,
            "label": np.asarray(labels, np.int32),
            "skipped": np.asarray(skipped, np.int32),
        }

    def _draw(self, draw: int) -> tuple[np.ndarray, int, int]:
        """Returns an image, its label, and the number of corrupt images that it replaces."""
        epoch, position = divmod(draw, draws_per_epoch(len(self.source), self.repeats))
        tries = min(_TRIES, len(self.source)) if self.skip_corrupt else 1
        for skipped in range(tries):
            place = (position // self.repeats + skipped) % len(self.source)
            rng = np.random.default_rng((self.seed, draw))
            try:
                index = self._shuffled(epoch, place)
                return *_transformed(self.source, index, self.transform, rng), skipped
            except CorruptImageError as error:
                failure = str(error)
                if self.skip_corrupt:
                    _say_once(failure)
        if not self.skip_corrupt:
            raise CorruptImageError(f"{failure}. {MEND}")
        raise CorruptImageError(f"{tries} images in a row are corrupt, the last of them {failure}")

    def _shuffled(self, epoch: int, place: int) -> int:
        """Returns the index of the image at a place in the order of an epoch."""
        if len(self.source) == 1:
            return 0  # index_shuffle needs two images
        seed = _epoch_seed(self.seed, epoch)
        return grain.experimental.index_shuffle(
            place, max_index=len(self.source) - 1, seed=seed, rounds=4
        )


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class EvalChunks:
    """The chunks of an evaluation that this process reads, as a sequence.

    Every image comes once, in order. The last batch is padded.

    Attributes:
      source: the images.
      transform: image -> uint8 (height, width, channels).
      share: the part of every global batch that this process reads.
      skip_corrupt: whether corrupt images are left out.
    """

    source: Source
    transform: Transform
    share: Share
    skip_corrupt: bool = False

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.share.batch_size) * self.share.chunks

    def __getitem__(self, chunk: int) -> Batch:
        """Returns "image" and "label" as in training, and "mask" (chunk,) float32.

        The mask is 1 for an image, 0 for padding and -1 for a corrupt image, whose pixels are black
        and whose label is -1.

        Raises:
          CorruptImageError: if an image is corrupt and may not be left out, or if the first images
            all are corrupt.
        """
        positions = self.share.positions(chunk)
        mask = np.asarray([position < len(self.source) for position in positions], np.float32)
        examples = [self._example(p) for p in positions if p < len(self.source)]
        blank = next((image for image, _ in filter(None, examples)), None)
        if blank is None:  # no image to take the shape from
            blank, _ = self._first()
        blank = np.zeros_like(blank)
        for number, example in enumerate(examples):
            if example is None:
                mask[number] = -1
        padded = [*examples, *[(blank, 0)] * (len(positions) - len(examples))]
        images, (labels,) = _gather((e or (blank, -1) for e in padded), len(positions))
        return {"image": images, "label": np.asarray(labels, np.int32), "mask": mask}

    def _example(self, index: int) -> tuple[np.ndarray, int] | None:
        """Returns an image and its label; None for a corrupt image that may be left out."""
        try:
            return _transformed(self.source, index, self.transform)
        except CorruptImageError as error:
            if not self.skip_corrupt:
                raise CorruptImageError(f"{error}. {MEND}") from None
            _say_once(str(error))
            return None

    def _first(self) -> tuple[np.ndarray, int]:
        """Returns the first image that is not corrupt."""
        tries = min(_TRIES, len(self.source))
        for index in range(tries):
            if (example := self._example(index)) is not None:
                return example
        where = self.source.description
        raise CorruptImageError(f"the first {tries} images are all corrupt: {where}")


def _transformed(
    source: Source, index: int, transform: Transform, *args: Any
) -> tuple[np.ndarray, int]:
    """Returns a transformed image and its label; errors of the transform name the image."""
    example = source[index]
    try:
        return transform(example["image"], *args), example["label"]
    except CorruptImageError as error:
        raise CorruptImageError(f"{example['name']}: {error}") from None
    except ValueError as error:  # the image does not fit the configuration
        raise ImageError(f"{example['name']}: {error}") from error


@functools.cache
def _say_once(failure: str) -> None:
    """Logs a corrupt image, once in each process however often it is drawn."""
    log.warning("corrupt, so it is skipped: %s", failure)


def _gather(examples: Iterable[tuple], count: int) -> tuple[np.ndarray, list[tuple]]:
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
