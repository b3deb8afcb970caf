"""Reads prepared tfds data sets, of ArrayRecord or TFRecord files, without TensorFlow.

tensorflow_datasets is imported only to read the metadata when a data set is opened. Worker
processes only read records and never import it.
"""

from collections.abc import Iterable
import dataclasses
import logging
import os
import pathlib
from typing import Any

import numpy as np

from convit_jax import storage
from convit_jax.data import held_out, local_copy, threads
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.source import Source, Subset, check_index, hashes
from convit_jax.data.tfds import bucket_records, records, stored
from convit_jax.data.tfds.prepared import find_root, find_version, how_to_prepare
from convit_jax.data.tfds.tf_example import parse_example

log = logging.getLogger(__name__)

FORMATS = {"array_record": "ArrayRecord", "tfrecord": "TFRecord"}  # tfds' name -> name in messages
NAME_FEATURES = ("file_name", "filename", "image/filename", "id")  # may hold the image's name


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RecordSource:
    """A split of a prepared tfds data set.

    Attributes:
      shards: the records.
      image_key: name of the image feature.
      label_key: name of the label feature.
      name_key: name of the feature that holds the file name; None if the data set has none.
      class_names: names of the classes, in the order of the labels.
      description: what is read and from where, in one line.
      cache_name: start of the names of this split's files in the cache folder.
    """

    shards: records.Records
    image_key: str
    label_key: str
    name_key: str | None
    class_names: tuple[str, ...]
    description: str
    cache_name: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self))
        keys = (self.image_key, self.label_key, self.name_key or "")
        record = self.shards[index]
        try:
            example = parse_example(record, keys)
        except CorruptImageError as error:
            raise CorruptImageError(f"{self.shards.where(index)}: {error}") from error
        image, label, found = (example.get(key) for key in keys)
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise CorruptImageError(
                f"{self.shards.where(index)}: expected bytes {self.image_key!r} and an integer "
                f"{self.label_key!r}, got {sorted(example)}"
            )
        name = self.shards.where(index)
        if isinstance(found, bytes) and found:
            name = found.decode(errors="replace")
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{self.shards.where(index)}, {name}: expected a label below "
                f"{self.num_classes}, got {label}"
            )
        return {"image": image, "label": label, "name": name}

    def request(self, indices: Iterable[int]) -> None:
        self.shards.request(indices)

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the names, (n,) bytes, and the labels, (n,) int32, of all images.

        This reads every byte of the split once. The result is stored in the folder `cache_dir`;
        None stores nothing.

        Raises:
          ValueError: if the data set has no file names.
        """

        def read(start: int) -> list[tuple[bytes, int]]:
            indices = range(start, min(start + 64, len(self)))
            self.request(indices)
            examples = (self[i] for i in indices)
            return [(os.fsencode(example["name"]), example["label"]) for example in examples]

        def build() -> stored.Arrays:
            blocks = threads.in_threads(
                "Reading labels", "x 64 images", read, range(0, len(self), 64)
            )
            names, labels = zip(*(pair for block in blocks for pair in block), strict=True)
            return {"names": np.array(names), "labels": np.array(labels, np.int32)}

        if self.name_key is None:
            raise ValueError(
                f"{self.description}: data.sampling_ratio takes the first file names of each "
                f"class, and this data set has none"
            )
        cache, paths = stored.cache_file(cache_dir, f"{self.cache_name}-labels"), self.shards.paths
        arrays = stored.cached(cache, stored.fingerprint(paths, storage.versions(paths)), build)
        return arrays["names"], arrays["labels"]

    def fingerprints(self) -> np.ndarray:
        # The version and the split of a tfds data set fix its images, so none has to be read.
        start = hashes([f"{self.cache_name} {self.shards.ends}".encode()])
        return start + np.arange(len(self), dtype=np.uint64)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which splits are read; the keys of the configuration with these names say more.

    Attributes:
      train_split: name of the split to train on; empty is "train".
      test_split: name of the split to evaluate on; empty is "validation", else "test".
      val_fraction: share held out for evaluation if there is no split but the training split.
      held_out: rule that chooses the images held out; only "hash" is possible.
    """

    train_split: str = ""
    test_split: str = ""
    val_fraction: float = 0.1
    held_out: str = "hash"


def open_tfds(
    spec: str,
    split: str,
    data_dir: str,
    cache_dir: str | None,
    splits: Splits,
    copy_dir: str = "",
) -> Source:
    """Opens a split of a prepared data set.

    Args:
      spec: NAME, NAME:VERSION or NAME/CONFIG.
      split: "train" or "test".
      data_dir: folder of the tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      cache_dir: folder for the indices of large data sets; None stores none.
      splits: which splits are read.
      copy_dir: folder on a local disk; the shards are copied to it once and read there. Who opens
        "train" opens "test" too, so the shards of both are copied then. Empty copies nothing.

    Raises:
      FileNotFoundError: if the data set or one of its shards is missing.
      ValueError: if the data set has another format, has no such split, is damaged, or is not for
        image classification.
      BucketError: if the data set is in a bucket that cannot be used.
      ModuleNotFoundError: if tensorflow-datasets is not installed.
    """
    root = find_root(data_dir)
    folder = find_version(spec, root)
    info = _tfds_info(folder)
    format_name = info.file_format.value
    if format_name not in FORMATS:
        raise ValueError(
            f"{folder}: expected ArrayRecord or TFRecord files, got {format_name}; "
            f"{_prepare_again(info, folder, root)}"
        )
    name, divided = _choose_split(info, split, splits, folder)
    _say_if_test_split_chooses(name, splits, folder)
    paths = [os.fspath(path) for path in info.splits[name].filepaths]
    if copy_dir:
        folder = local_copy.copied([*paths, *_also_read(info, split, splits, folder)], copy_dir)
        paths = [os.path.join(folder, os.path.basename(path)) for path in paths]
    lengths = info.splits[name].shard_lengths
    found = dict(zip(paths, storage.versions(paths), strict=True))
    versions = [version for version in found.values() if version is not None]
    missing = [path for path, version in found.items() if version is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing):,} of {len(paths):,} shards of the {name} split are missing, "
            f"the first is {missing[0]}; copy them, or "
            f"{_prepare_again(info, folder, root)}"
        )
    cache_name = f"{info.full_name}-{name}".replace("/", "-")
    shards: records.Records
    if format_name != "tfrecord":
        shards = records.open_array_records(paths, lengths)
    elif storage.is_bucket(paths[0]):
        shards = bucket_records.open_tfrecords(
            paths, lengths, versions, cache_dir, f"{cache_name}-index"
        )
    else:
        cache = stored.cache_file(cache_dir, f"{cache_name}-index")
        shards = records.open_tfrecords(paths, lengths, versions, cache)
    description = (
        f"{info.full_name} {name}, {FORMATS[format_name]}, {len(paths):,} shards in {folder}"
    )
    opened = RecordSource(shards, *_tfds_keys(info), description, cache_name)
    return _divide(opened, f"{info.full_name}/{name}", split, splits) if divided else opened


def _choose_split(info: Any, split: str, splits: Splits, folder: pathlib.Path) -> tuple[str, bool]:
    """Returns the name of the split to read, and whether it has to be divided."""
    counts = {name: part.num_examples for name, part in info.splits.items()}
    there = [name for name, count in counts.items() if count]
    for key, name in (("train_split", splits.train_split), ("test_split", splits.test_split)):
        if name and name not in there:
            raise ValueError(
                f"data.{key}: expected the name of a split of {folder} with images, got {name!r}; "
                f"there: {counts}"
            )
    train = splits.train_split or "train"
    if train == splits.test_split:
        raise ValueError(
            f"data.test_split: expected another split than the training split, got {train!r}"
        )
    names = [splits.test_split] if splits.test_split else ["validation", "test"]
    found = [name for name in names if name in there and name != train]
    divided = not found and there == [train]
    wanted = train if split == "train" or divided else next(iter(found), "")
    if wanted not in there:
        key, expected = ("train_split", train) if split == "train" else ("test_split", None)
        choice = [name for name in there if expected or name != train]
        raise ValueError(
            f"{folder}: expected a {expected or 'validation or test'} split with images, got "
            f"{counts}" + (f"; choose with --config.data.{key}={choice[0]}" if choice else "")
        )
    return wanted, divided


def _say_if_test_split_chooses(name: str, splits: Splits, folder: pathlib.Path) -> None:
    in_training = splits.val_fraction < 1  # 1 is an evaluation of weights, without a run
    if name == "test" and not splits.test_split and in_training:
        log.info(
            "%s: its test split chooses the best checkpoint of a run, as there is no validation "
            "split: the accuracy on it is optimistic", folder,
        )  # fmt: skip


def _also_read(info: Any, split: str, splits: Splits, folder: pathlib.Path) -> list[str]:
    """Returns the shards that are read besides those of a split: who trains evaluates too."""
    if split == "test":
        return []
    name, _ = _choose_split(info, "test", splits, folder)
    return [os.fspath(path) for path in info.splits[name].filepaths]


def _divide(source: RecordSource, name: str, split: str, splits: Splits) -> Subset:
    """Returns one part of a data set that has a training split only.

    Args:
      source: the training split.
      name: name of the data set, its version and split.
      split: "train" or "test".
      splits: share and rule of what is held out.
    """
    held_out.check_fraction(splits.val_fraction, split)
    if splits.held_out != "hash":
        raise ValueError(
            f"data.held_out: expected 'hash' for a tfds data set, got {splits.held_out!r}"
        )
    names = (f"{name}/{index}".encode() for index in range(len(source)))
    chosen = held_out.by_hash(names, splits.val_fraction) == (split == "test")
    share = f", {splits.val_fraction:.0%} held out by the hash of the index, {split} part"
    share = ", all images" if splits.val_fraction == 1 else share
    if not chosen.any():
        raise ValueError(f"{source.description}: too few images for a {split} split{share}")
    return Subset(source, np.flatnonzero(chosen), source.description + share)


def _tfds_info(folder: pathlib.Path) -> Any:
    """Returns tfds' DatasetInfo of a prepared folder."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f"data.source: tfds:... needs pip install tensorflow-datasets ({error})"
        ) from error
    try:
        # Not tfds.data_source, which starts to prepare a data set that it does not find.
        return tfds.builder_from_directory(os.fspath(folder)).info
    except Exception as error:  # of many kinds, depending on what is wrong in the folder
        if outage := storage.outage_behind(error):
            raise outage from None  # the files may be intact
        raise ValueError(
            f"{folder}: tfds cannot read dataset_info.json and features.json: {error}; copy or "
            f"prepare the data set again"
        ) from error


def _prepare_again(info: Any, folder: pathlib.Path, root: pathlib.Path) -> str:
    """Returns what mends a prepared folder. No command replaces one that is there."""
    spec = f"{info.name}/{info.config_name}" if info.config_name else info.name
    return f"move {folder} away and prepare it again. {how_to_prepare(spec, root)}"


def _tfds_keys(info: Any) -> tuple[str, str, str | None, tuple[str, ...]]:
    """Returns the names of the image, label and file name features, and the class names.

    The name of the file name feature is None if the data set has no such feature.
    """
    import tensorflow_datasets as tfds

    def only(kind: type, place: int) -> str:
        keys = [key for key, feature in info.features.items() if isinstance(feature, kind)]
        if len(keys) > 1 and info.supervised_keys and info.supervised_keys[place] in keys:
            keys = [info.supervised_keys[place]]
        if len(keys) != 1:
            raise ValueError(
                f"data.source: tfds:{info.full_name} is not for image classification: expected "
                f"one {kind.__name__} feature, got {keys} of {list(info.features)}"
            )
        return keys[0]

    image, label = only(tfds.features.Image, 0), only(tfds.features.ClassLabel, 1)
    features = dict(info.features.items())
    texts = [key for key in NAME_FEATURES if isinstance(features.get(key), tfds.features.Text)]
    count = info.features[label].num_classes
    class_names = info.features[label].names or map(str, range(count or 0))
    return image, label, texts[0] if texts else None, tuple(class_names)
