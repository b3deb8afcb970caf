"""The order of the images, and how they become batches.

Training images form an endless stream, and a draw is the number of an image in it. The seed and the
draw alone decide which image is read and how it is augmented. So there is no data state to save: a
run started at any step, with any number of workers or processes, sees the same batches.

The stream is cut into chunks. One worker makes a chunk from its position alone, and a batch is a
whole number of chunks. Every process reads its own contiguous share of each global batch.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math

import numpy as np
from numpy.typing import ArrayLike

from convit_jax.data.arrays import ArraySource
from convit_jax.data.batches.gather import Transform, gather, naming, say_once, transformed
from convit_jax.data.batches.shuffle import shuffled, shuffled_places
from convit_jax.data.corrupt import MEND, CorruptImageError
from convit_jax.data.images.random_numbers import uniforms
from convit_jax.data.images.transforms import TrainTransform
from convit_jax.data.source import Source, Subset

Batch = dict[str, np.ndarray]
_Images = tuple[np.ndarray, ArrayLike, ArrayLike]  # pixels, labels, numbers of skipped images

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
        draws = self.share.positions(chunk)
        if isinstance(self.transform, TrainTransform) and self.transform.numbers:
            images, labels, skipped = self._at_once(draws, self.transform)
        else:
            images, labels, skipped = self._one_by_one(draws, self._with_generator)
        return {
            "image": images,
            "label": np.asarray(labels, np.int32),
            "skipped": np.asarray(skipped, np.int32),
        }

    def request(self, chunk: int) -> None:
        """Begins to read the images of a chunk that will be made soon, if they are in a bucket."""
        self.source.request(self._indices_when_asked(self.share.positions(chunk)))

    def _at_once(self, draws: range, transform: TrainTransform) -> _Images:
        """Transforms all images of the draws at once."""
        source, indices = self.source, self._indices(draws)
        while isinstance(source, Subset):
            indices, source = source.indices[indices], source.source
        labels: ArrayLike
        skipped: ArrayLike
        if isinstance(source, ArraySource):
            images, labels = source.images[indices], source.labels[indices]
            with naming(source.names[indices[0]].decode()):
                transform.pixels(images[0])  # raises if it does not fit, and all are alike
            skipped = np.zeros(len(draws))
        else:
            images, labels, skipped = self._one_by_one(draws, lambda x, _: transform.pixels(x))
        numbers = uniforms(self.seed, draws, transform.numbers)
        return transform.of_chunk(images, numbers), labels, skipped

    def _with_generator(self, image: bytes | np.ndarray, draw: int) -> np.ndarray:
        return self.transform(image, np.random.default_rng((self.seed, draw)))

    def _indices(self, draws: range) -> np.ndarray:
        """Returns the indices of the images of draws, if none is corrupt."""
        size = len(self.source)
        epochs, positions = np.divmod(np.asarray(draws), draws_per_epoch(size, self.repeats))
        places = positions // self.repeats % size
        parts = [
            shuffled_places(places[epochs == epoch], size, _epoch_seed(self.seed, epoch))
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        return np.concatenate(parts)

    def _indices_when_asked(self, draws: range) -> Iterator[int]:
        """Yields `_indices`, which are not computed for a source that does not read them."""
        yield from self._indices(draws).tolist()

    def _one_by_one(self, draws: range, make: Callable[..., np.ndarray]) -> _Images:
        """Reads the images of the draws one by one; `make` takes (image, draw)."""
        images, (labels, skipped) = gather((self._draw(d, make) for d in draws), len(draws))
        return images, labels, skipped

    def _draw(self, draw: int, make: Callable[..., np.ndarray]) -> tuple[np.ndarray, int, int]:
        """Returns an image, its label, and the number of corrupt images that it replaces."""
        size = len(self.source)
        epoch, position = divmod(draw, draws_per_epoch(size, self.repeats))
        tries = min(_TRIES, size) if self.skip_corrupt else 1
        for skipped in range(tries):
            place = (position // self.repeats + skipped) % size
            try:
                index = shuffled(place, size, _epoch_seed(self.seed, epoch))
                return *transformed(self.source, index, make, draw), skipped
            except CorruptImageError as error:
                failure = str(error)
                if self.skip_corrupt:
                    say_once(failure)
        if not self.skip_corrupt:
            raise CorruptImageError(f"{failure}. {MEND}")
        raise CorruptImageError(f"{tries} images in a row are corrupt, the last of them {failure}")


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
        images, (labels,) = gather((e or (blank, -1) for e in padded), len(positions))
        return {"image": images, "label": np.asarray(labels, np.int32), "mask": mask}

    def request(self, chunk: int) -> None:
        """Begins to read the images of a chunk that will be made soon, if they are in a bucket."""
        self.source.request(p for p in self.share.positions(chunk) if p < len(self.source))

    def _example(self, index: int) -> tuple[np.ndarray, int] | None:
        """Returns an image and its label; None for a corrupt image that may be left out."""
        try:
            return transformed(self.source, index, self.transform)
        except CorruptImageError as error:
            if not self.skip_corrupt:
                raise CorruptImageError(f"{error}. {MEND}") from None
            say_once(str(error))
            return None

    def _first(self) -> tuple[np.ndarray, int]:
        """Returns the first image that is not corrupt."""
        tries = min(_TRIES, len(self.source))
        for index in range(tries):
            if (example := self._example(index)) is not None:
                return example
        where = self.source.description
        raise CorruptImageError(f"the first {tries} images are all corrupt: {where}")
