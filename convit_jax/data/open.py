"""Opens a data set by its name: tfds sets, class folders, scikit-learn's digits."""

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
      source: "tfds:NAME", "tfds:NAME:VERSION" or "tfds:NAME/CONFIG" for a prepared tfds set,
        "folder:PATH" for class folders below train/ and val/ (or validation/, or test/) of
        PATH or, where there are none of these, in PATH itself; "digits" for scikit-learn's.
      split: "train", or "test" for the images held out: of a tfds set its validation split or,
        if it has none, its test split.
      data_dir: where the tfds sets are; if empty, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      sampling_ratio: share of the training images of each class, the first by file name; the
        test split is always whole.
      cache_dir: where to keep indices of large sets; None keeps none.
      val_fraction: share of each class that a folder without val/ holds out.

    Raises:
      ValueError, FileNotFoundError: if the data are not there or not what they should be.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not 0 < sampling_ratio <= 1:
        raise ValueError(f"data.sampling_ratio: expected 0 < ratio <= 1, got {sampling_ratio}")
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
