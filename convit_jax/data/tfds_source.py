"""Reads prepared tfds data sets, of ArrayRecord or TFRecord files, without TensorFlow.

tensorflow_datasets is imported only to read the metadata when a data set is opened. Worker
processes only read records and never import it.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from convit_jax.data import records, threads
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.source import check_index
from convit_jax.data.tf_example import parse_example

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

    def names_and_labels(self, cache_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the names, (n,) bytes, and the labels, (n,) int32, of all images.

        This reads every byte of the split once. The result is stored in the folder `cache_dir`;
        None stores nothing.

        Raises:
          ValueError: if the data set has no file names.
        """

        def read(start: int) -> list[tuple[bytes, int]]:
            examples = (self[i] for i in range(start, min(start + 256, len(self))))
            return [(os.fsencode(example["name"]), example["label"]) for example in examples]

        def build() -> records.Arrays:
            blocks = threads.in_threads(
                "Reading labels", "x 256 images", read, range(0, len(self), 256)
            )
            names, labels = zip(*(pair for block in blocks for pair in block), strict=True)
            return {"names": np.array(names), "labels": np.array(labels, np.int32)}

        if self.name_key is None:
            raise ValueError(
                f"{self.description}: data.sampling_ratio takes the first file names of each "
                f"class, and this data set has none"
            )
        cache = records.cache_file(cache_dir, f"{self.cache_name}-labels")
        arrays = records.cached(cache, records.fingerprint(self.shards.paths), build)
        return arrays["names"], arrays["labels"]


def open_tfds(spec: str, split: str, data_dir: str, cache_dir: str | None) -> RecordSource:
    """Opens a split of a prepared data set.

    Args:
      spec: NAME, NAME:VERSION or NAME/CONFIG.
      split: "train", or "test" for the validation split or, if there is none, the test split.
      data_dir: folder of the tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      cache_dir: folder for the indices of large data sets; None stores none.

    Raises:
      FileNotFoundError: if the data set or one of its shards is missing.
      ValueError: if the data set has another format, has no such split, is damaged, or is not for
        image classification.
      ImportError: if tensorflow-datasets is not installed.
    """
    root = _find_root(data_dir)
    folder = _find_version(spec, root)
    info = _tfds_info(folder)
    format_name = info.file_format.value
    if format_name not in FORMATS:
        raise ValueError(
            f"{folder}: expected ArrayRecord or TFRecord files, got {format_name}; "
            f"{_prepare_command(info.name, root)}"
        )
    candidates = ("train",) if split == "train" else ("validation", "test")
    name = next((name for name in candidates if name in info.splits), None)
    if name is None or not info.splits[name].num_examples:
        raise ValueError(
            f"{folder}: expected a {' or '.join(candidates)} split with images, got "
            f"{ ({key: value.num_examples for key, value in info.splits.items()}) }"
        )
    paths = [os.fspath(path) for path in info.splits[name].filepaths]
    lengths = info.splits[name].shard_lengths
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing):,} of {len(paths):,} shards of the {name} split are missing, "
            f"the first is {missing[0]}; copy them, or {_prepare_command(info.name, root)}"
        )
    cache_name = f"{info.full_name}-{name}".replace("/", "-")
    shards: records.Records
    if format_name == "tfrecord":
        cache = records.cache_file(cache_dir, f"{cache_name}-index")
        shards = records.open_tfrecords(paths, lengths, cache)
    else:
        shards = records.open_array_records(paths, lengths)
    description = f"{info.full_name} {name}, {FORMATS[format_name]}, {len(paths):,} shards in"
    return RecordSource(shards, *_tfds_keys(info), f"{description} {folder}", cache_name)


def _find_root(data_dir: str) -> pathlib.Path:
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in data_dir:
        raise ValueError(
            f"data.dir: expected a local folder, got {data_dir!r}; mount it (gcsfuse for "
            f"gs://) or copy it"
        )
    return pathlib.Path(data_dir).expanduser().absolute()


def _find_version(spec: str, root: pathlib.Path) -> pathlib.Path:
    """Returns the folder ROOT/NAME[/CONFIG]/VERSION, by default of the highest prepared version."""
    name, _, version = spec.partition(":")
    folder = root / name
    versions = _versions(folder)
    configs = [child for child in _folders(folder) if _versions(child)]
    if not versions and len(configs) == 1:
        folder = configs[0]
        versions = _versions(folder)
    elif not versions and configs:
        raise ValueError(
            f"data.source: {folder} holds several configurations; name one of "
            f"{[f'tfds:{name}/{child.name}' for child in configs]}"
        )
    if version in versions:
        return folder / version
    if versions and not version:
        return folder / versions[-1]
    if versions:
        found = f"versions {', '.join(versions)} alone"
    elif (root / "dataset_info.json").is_file() or _versions(root):
        found = f"a data set in {root} itself: data.dir is the folder above NAME/VERSION"
    elif root.is_dir():
        found = f"in {root}: {', '.join(child.name for child in _folders(root)) or 'nothing'}"
    else:
        found = f"no folder {root}: set data.dir or TFDS_DATA_DIR"
    raise FileNotFoundError(
        f"data.source: expected tfds:{spec} prepared in {folder / (version or 'VERSION')}, got "
        f"{found}. To prepare it: {_prepare_command(name, root)}"
    )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _versions(path: pathlib.Path) -> list[str]:
    """Returns the prepared versions in a folder, in rising order.

    A version that is not fully prepared has no dataset_info.json and is left out.
    """
    names = [
        child.name
        for child in _folders(path)
        if child.name.replace(".", "").isdigit() and (child / "dataset_info.json").is_file()
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".") if part])


def _prepare_command(name: str, data_dir: pathlib.Path) -> str:
    if name == "imagenet2012":
        return f"convit data prepare --tars DIR --data_dir {data_dir}"
    return (
        f"tfds build {name} --file_format=array_record --data_dir {data_dir} (after pip install "
        f"tensorflow tensorflow-datasets)"
    )


def _tfds_info(folder: pathlib.Path) -> Any:
    """Returns tfds' DatasetInfo of a prepared folder."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"data.source: tfds:... needs pip install tensorflow-datasets ({error})"
        ) from error
    try:
        # Not tfds.data_source, which starts to prepare a data set that it does not find.
        return tfds.builder_from_directory(os.fspath(folder)).info
    except Exception as error:  # of many kinds, depending on what is wrong in the folder
        raise ValueError(
            f"{folder}: tfds cannot read dataset_info.json and features.json: {error}; copy or "
            f"prepare the data set again"
        ) from error


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
