"""The order of the images, and how they become batches.

The order is a function of (seed, draw) and an augmentation likewise, a draw being the number of an
image in the endless stream of training: there is no state to save, and a run started at any step,
with other workers or other processes, sees the batches it would have seen.

The stream is cut into chunks, each made by one worker from its position alone; a batch is a whole
number of them. Every process reads its own contiguous share of each global batch.
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

_CHUNK = 64  # images at most: what a worker makes at a time, and holds
_ENDLESS = 2**40  # chunks
_TRIES = 100  # images looked at in place of a corrupt one


def draws_per_epoch(num_images: int, repeats: int) -> int:
    """Images drawn in an epoch: all of them once, or with repeated augmentation about as many.

    With repeats, an epoch is cut to a multiple of 256 as in DeiT's RASampler, and shows a third
    of the images three times each (Hoffer et al. 2020, arXiv:1901.09335; DeiT, section 6).
    """
    return num_images // 256 * 256 or num_images if repeats > 1 else num_images


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every global batch that one process reads.

    Attributes:
      batch_size: of the global batch, which the processes divide evenly.
      index: of this process.
      count: of processes.
    """

    batch_size: int
    index: int = 0
    count: int = 1

    def __post_init__(self):
        if self.batch_size % self.count:
            raise ValueError(
                f"batch size: expected a multiple of the {self.count} processes, "
                f"got {self.batch_size}"
            )

    @property
    def size(self) -> int:
        return self.batch_size // self.count

    @functools.cached_property
    def chunk(self) -> int:
        """Images of a chunk: the largest divisor of the share up to _CHUNK."""
        return max(d for d in range(1, min(_CHUNK, self.size) + 1) if self.size % d == 0)

    @property
    def chunks(self) -> int:
        """Chunks of a batch."""
        return self.size // self.chunk

    def positions(self, chunk: int) -> range:
        """Positions in the global stream of a chunk of this process."""
        step, part = divmod(chunk, self.chunks)
        start = step * self.batch_size + self.index * self.size + part * self.chunk
        return range(start, start + self.chunk)


@dataclasses.dataclass(frozen=True)
class TrainChunks:
    """The chunks of training, by their number.

    Attributes:
      source: the images.
      transform: (image, rng) -> uint8 (height, width, channels).
      share: what this process reads.
      seed: of order and augmentation.
      repeats: how often an image comes in a row (repeated augmentation).
      skip_corrupt: whether to put the next image of the epoch in place of a corrupt one.
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
        """ "image" (chunk, h, w, c) uint8, "label" and "skipped" (chunk,) int32.

        "skipped" counts the corrupt images that an image stands for.
        """
        draws = map(self._draw, self.share.positions(chunk))
        images, (labels, skipped) = _gather(draws, self.share.chunk)
        return {
            "image": images,
            "label": np.asarray(labels, np.int32),
            "skipped": np.asarray(skipped, np.int32),
        }

    def _draw(self, draw: int) -> tuple[np.ndarray, int, int]:
        """Image, label, and how many corrupt images stood in its place."""
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
        """The index of the image at a place of an epoch's order."""
        if len(self.source) == 1:
            return 0  # index_shuffle needs two
        seed = _epoch_seed(self.seed, epoch)
        return grain.experimental.index_shuffle(
            place, max_index=len(self.source) - 1, seed=seed, rounds=4
        )


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class EvalChunks:
    """The chunks of an evaluation: every image once, in order, the last batch padded.

    Attributes:
      source: the images.
      transform: image -> uint8 (height, width, channels).
      share: what this process reads.
    """

    source: Source
    transform: Transform
    share: Share

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.share.batch_size) * self.share.chunks

    def __getitem__(self, chunk: int) -> Batch:
        """ "image", "label" as in training, and "mask" (chunk,) float32: 0 for padding."""
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
    """Of `count` tuples (image, ...) the images as one array, and what follows, each as a tuple.

    Every image is copied while it is in the cache still, and let go.
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
