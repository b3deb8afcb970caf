"""Where images come from, in what order, and how they become batches.

The order is a function of (seed, position) and an augmentation of (seed, draw): there is no
state to save, and a run started at any step sees the batches it would have seen.
"""

from collections.abc import Iterator
import dataclasses

import grain
import jax
import numpy as np

from convit_jax import augment

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A random-access source in memory: images (n, height, width, channels) uint8, labels (n,)."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"image": self.images[index], "label": self.labels[index]}


def open_source(name: str, split: str) -> ArraySource:
    """Opens a data set.

    Args:
      name: "digits", scikit-learn's handwritten digits.
      split: "train" or "test".

    Raises:
      ValueError: if there is no such data set.
    """
    if name != "digits":
        raise ValueError(f"data.source: expected 'digits', got {name!r}")
    return _digits(split)


def _digits(split: str) -> ArraySource:
    """scikit-learn's digits, a fifth of every class held out for the test: 1,437 and 360 images."""
    from sklearn import datasets, model_selection  # a second to import

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # 0 to 16 there
    labels = digits.target.astype(np.int32)
    parts = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    index = np.sort(parts[("train", "test").index(split)])
    return ArraySource(images[index], labels[index], num_classes=10)


def train_batches(
    source: ArraySource,
    batch_size: int,
    seed: int,
    pad_crop: int = 0,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Endless training batches: every epoch in a new order, every draw with its own augmentation.

    Args:
      source: the images.
      batch_size: images of the global batch; the processes must divide it.
      seed: of order and augmentation.
      pad_crop: see `augment.pad_and_crop`.
      start_step: the number of batches that were already seen.
      process_index: which slice of the global batch to read; this process's by default.
      process_count: how many slices there are.

    Yields:
      "image" (b, height, width, channels) uint8 and "label" (b,) int32, b this process's share.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count

    def transform(example: Batch, rng: np.random.Generator) -> Batch:
        return example | {"image": augment.pad_and_crop(example["image"], rng, pad_crop)}

    draws = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(transform)
    # After shuffle and map, so that any number of processes reads the same global batches.
    batches = draws[index::count].batch(batch_size // count)
    # No threads: the images are in memory, and the step runs while the next batch is made.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches[start_step:].to_iter_dataset(options))


def eval_batches(source: ArraySource, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is padded to the size of the others.

    Yields:
      "image" (batch_size, height, width, channels), "label" and "mask" (batch_size,), the mask
      1 for an image and 0 for padding.
    """
    for start in range(0, len(source), batch_size):
        items = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        padding = batch_size - len(items)
        mask = np.repeat(np.float32([1, 0]), [len(items), padding])
        items += items[:1] * padding
        yield {key: np.stack([item[key] for item in items]) for key in items[0]} | {"mask": mask}
