"""Opens a data set by its name: a tfds data set, class folders or scikit-learn's digits."""

from convit_jax.data import tfds_source
from convit_jax.data.arrays import digits
from convit_jax.data.folders import open_folder
from convit_jax.data.source import Source, subset

SPLITS = ("train", "test")


def open_source(
    source: str,
    split: str,
    *,
    data_dir: str = "",
    sampling_ratio: float = 1.0,
    cache_dir: str | None = None,
    val_fraction: float = 0.1,
) -> Source:
    """Opens a data set.

    Args:
      source: name of the data set.
        "tfds:NAME", "tfds:NAME:VERSION" or "tfds:NAME/CONFIG" is a prepared tfds data set.
        "folder:PATH" is a folder with train/ and val/ (or validation/, or test/), each with a
        folder of images for every class; or a folder that holds the class folders itself.
        "digits" is scikit-learn's digits.
      split: "train", or "test" for the images held out. For a tfds data set, "test" is its
        validation split, or its test split if it has no validation split.
      data_dir: folder of the tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      sampling_ratio: share of the training images of each class to keep, the first by file name.
        The test split is always whole.
      cache_dir: folder for the indices of large data sets; None keeps no indices.
      val_fraction: share of each class held out for "test" if PATH has no train/ and val/.

    Raises:
      ValueError, FileNotFoundError: if the data are missing or not as expected.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not 0 < sampling_ratio <= 1:
        raise ValueError(f"data.sampling_ratio: expected 0 < ratio <= 1, got {sampling_ratio}")
    opened: Source
    kind, _, rest = source.partition(":")
    if source == "digits":
        opened = digits(split)
    elif kind == "folder" and rest:
        opened = open_folder(rest, split, val_fraction)
    elif kind == "tfds" and rest:
        opened = tfds_source.open_tfds(rest, split, data_dir, cache_dir)
    else:
        raise ValueError(
            f"data.source: expected 'digits', 'folder:PATH' or 'tfds:NAME', got {source!r}"
        )
    if split == "train" and sampling_ratio < 1:
        opened = subset(opened, sampling_ratio, cache_dir)
    return opened
