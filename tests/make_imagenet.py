"""A small ImageNet in the layouts that people have: tfds (either format), class folders, tars.

    python tests/make_imagenet.py DIR

writes DIR/array_record and DIR/tfrecord (each a tfds data_dir), DIR/folder and DIR/tars. The
metadata and the order of the records are those of tfds' own imagenet2012 builder. The photos are
real ones, from scikit-learn and, if installed, scikit-image. TensorFlow is not needed.

The result was compared once, by hand, with the data set that tfds 4.9.10 and TensorFlow 2.21
prepared from these tars (too heavy for CI). The metadata were equal to the byte, the shards had the
same names and sizes, and every parsed record was equal and in the same place. Only the order of the
features inside a serialised Example differed, which TensorFlow changes from run to run.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import importlib.util
import io
import os
import pathlib
import struct
import sys
import tarfile

import numpy as np
from PIL import Image

SPLITS = ("train", "validation")
# Width and height, mode and file type, taken in turn by the images: mostly ImageNet's commonest
# size, and some shapes and modes that are difficult for readers.
KINDS = (
    ((500, 375), "RGB", "JPEG"),
    ((375, 500), "RGB", "JPEG"),
    ((500, 333), "L", "JPEG"),
    ((500, 375), "CMYK", "JPEG"),
    ((400, 300), "RGB", "PNG"),
    ((1600, 1200), "RGB", "JPEG"),
    ((500, 375), "RGB", "JPEG"),
    ((127, 91), "RGB", "JPEG"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    name: str
    synset: str
    image: bytes


def photos() -> list[Image.Image]:
    """The photos that the installed packages carry."""
    paths = []
    for package, folder, names in (
        ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
        ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            root = pathlib.Path(spec.submodule_search_locations[0], folder)
            paths += [root / name for name in names]
    return [Image.open(path).convert("RGB") for path in paths]


def encode(photo: Image.Image, number: int) -> bytes:
    """Encodes a crop of the photo; the number decides the crop, the mode and the file type."""
    (width, height), mode, kind = KINDS[number % len(KINDS)]
    rng = np.random.default_rng(number)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.6, 1)
    w, h = width * scale, height * scale
    x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    out = io.BytesIO()
    image.convert(mode).save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue()


def make_examples(per_class: int = 4, validation: int = 8) -> dict[str, list[Example]]:
    """Makes the two splits; train has the classes of ILSVRC2012's first validation images."""
    from tensorflow_datasets.core.utils import resource_utils

    path = resource_utils.tfds_path("datasets/imagenet2012/validation_labels.txt")
    synsets = path.read_text().split()[:validation]
    pictures = photos()

    def image(number: int) -> bytes:
        return encode(pictures[number % len(pictures)], number)

    train = [
        Example(f"{synset}_{n}.JPEG", synset, image(i * per_class + n))
        for i, synset in enumerate(sorted(set(synsets)))
        for n in range(per_class)
    ]
    held_out = [
        Example(f"ILSVRC2012_val_{i + 1:08}.JPEG", synset, image(len(train) + i))
        for i, synset in enumerate(synsets)
    ]
    return dict(zip(SPLITS, (train, held_out), strict=True))


def write_folder(path: str | os.PathLike, examples: dict[str, list[Example]]) -> None:
    """Class folders under train/ and val/."""
    for split, folder in zip(SPLITS, ("train", "val"), strict=True):
        for example in examples[split]:
            file = pathlib.Path(path, folder, example.synset, example.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(example.image)


def write_tars(path: str | os.PathLike, examples: dict[str, list[Example]]) -> None:
    """ILSVRC2012_img_train.tar, a tar of a tar for each class, and ILSVRC2012_img_val.tar."""
    os.makedirs(path, exist_ok=True)

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(pathlib.Path(path, "ILSVRC2012_img_train.tar"), "w") as outer:
        for synset in sorted({example.synset for example in examples["train"]}):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for example in examples["train"]:
                    if example.synset == synset:
                        add(inner, example.name, example.image)
            add(outer, f"{synset}.tar", content.getvalue())
    with tarfile.open(pathlib.Path(path, "ILSVRC2012_img_val.tar"), "w") as tar:
        for example in examples["validation"]:
            add(tar, example.name, example.image)


def write_tfds(
    data_dir: str | os.PathLike,
    examples: dict[str, list[Example]],
    file_format: str,
    shards: int = 2,
) -> pathlib.Path:
    """Writes DIR/imagenet2012/5.1.0 as tfds prepares it, and returns that folder."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    builder = imagenet2012_dataset_builder.Builder(
        data_dir=os.fspath(data_dir), file_format=file_format
    )
    splits = {
        split: {
            item.name: {"file_name": item.name, "image": item.image, "label": item.synset}
            for item in items
        }
        for split, items in examples.items()
    }
    return write_prepared(builder, splits, shards)


def write_prepared(builder, splits: dict[str, dict[str, dict]], shards: int = 2) -> pathlib.Path:
    """Writes {split: {key: example}} as a tfds builder does; images are encoded bytes."""
    from tensorflow_datasets.core import example_serializer, hashing, naming
    from tensorflow_datasets.core import splits as tfds_splits
    from tensorflow_datasets.core.utils import shard_utils

    folder = pathlib.Path(builder.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    features, file_format = builder.info.features, builder.info.file_format.value
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    infos = []
    for split, items in splits.items():
        template = naming.ShardedFileTemplate(
            dataset_name=builder.name, data_dir=folder, filetype_suffix=file_format, split=split
        )
        hasher = hashing.Hasher(split)
        records = []
        for key in sorted(items, key=hasher.hash_key):
            encoded = features.encode_example(
                items[key] | {"image": io.BytesIO(items[key]["image"])}
            )
            example = serializer.get_tf_example(encoded)
            # Deterministic, since otherwise the order of the features varies from run to run.
            records.append(example.SerializeToString(deterministic=True))
        ends = shard_utils.get_shard_boundaries(len(records), shards)
        spans = list(zip([0, *ends], ends, strict=False))
        for shard, (start, end) in enumerate(spans):
            path = template.sharded_filepath(shard_index=shard, num_shards=shards)
            WRITERS[file_format](path, records[start:end])
        infos.append(
            tfds_splits.SplitInfo(
                name=split,
                shard_lengths=[end - start for start, end in spans],
                num_bytes=sum(map(len, records)),
                filename_template=template,
            )
        )
    builder.info.set_splits(tfds_splits.SplitDict(infos))
    builder.info.write_to_directory(folder)
    return folder


def _write_array_record(path: str | os.PathLike, records: Iterable[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def _write_tfrecord(path: str | os.PathLike, records: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                file.write(part + struct.pack("<I", masked_crc32c(part)))


WRITERS = {"array_record": _write_array_record, "tfrecord": _write_tfrecord}


def _crc_table() -> Iterator[int]:
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's, reflected
        yield byte


_TABLE = tuple(_crc_table())


def masked_crc32c(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, turned by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def main(path: str) -> None:
    examples = make_examples()
    for file_format in WRITERS:
        print(write_tfds(pathlib.Path(path, file_format), examples, file_format))
    write_folder(pathlib.Path(path, "folder"), examples)
    write_tars(pathlib.Path(path, "tars"), examples)


if __name__ == "__main__":
    main(*sys.argv[1:])
