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
import math

import grain
import numpy as np

from convit_jax.data.source import Source

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


class CorruptImageError(ValueError):
    """Raised for an image that cannot be decoded; the message names the image."""


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
          CorruptImageError: if an image cannot be decoded and none may replace it.
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
        for skipped in range(min(_TRIES, len(self.source)) if self.skip_corrupt else 1):
            place = (position // self.repeats + skipped) % len(self.source)
            example = self.source[self._shuffled(epoch, place)]
            rng = np.random.default_rng((self.seed, draw))
            try:
                return self.transform(example["image"], rng), example["label"], skipped
            except ValueError as error:
                failure = f"{example['name']}: {error}"
        raise CorruptImageError(
            f"{failure}. Mend or remove the file, or set data.skip_corrupt=True to use others in "
            "its place"
        )

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
    """

    source: Source
    transform: Transform
    share: Share

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.share.batch_size) * self.share.chunks

    def __getitem__(self, chunk: int) -> Batch:
        """Returns "image" and "label" as in training, and "mask" (chunk,) float32, 0 for padding.

        Raises:
          CorruptImageError: if an image cannot be decoded.
        """
        positions = self.share.positions(chunk)
        mask = np.asarray([position < len(self.source) for position in positions], np.float32)
        examples = (self._example(p if p < len(self.source) else 0) for p in positions)
        images, (labels,) = _gather(examples, len(positions))
        return {"image": images, "label": np.asarray(labels, np.int32), "mask": mask}

    def _example(self, index: int) -> tuple[np.ndarray, int]:
        example = self.source[index]
        try:
            return self.transform(example["image"]), example["label"]
        except ValueError as error:
            raise CorruptImageError(f"{example['name']}: {error}") from None


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
