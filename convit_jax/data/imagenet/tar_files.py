"""The two tars of ImageNet (ILSVRC2012): checks them, and finds where each image is stored."""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import posixpath
import tarfile
from types import ModuleType

import numpy as np
import tqdm

from convit_jax import storage
from convit_jax.data.first_names import first_names

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
SOURCE = "Both tars come from https://image-net.org/download-images, after registration."
_TAR_BYTES = {TRAIN_TAR: 147_897_477_120, VALIDATION_TAR: 6_744_924_160}  # tfds, checksums.tsv
_THREADS = 16  # they mostly wait for the disk, so more than one a core


@dataclasses.dataclass(frozen=True)
class Images:
    """Where n images are stored in their tar.

    Attributes:
      tar: path of the tar.
      names: (n,) bytes, file names of the images.
      offsets: (n,) int64, position in `tar` of the first byte of each image.
      sizes: (n,) int64, number of bytes of each image.
      labels: (n,) int64, class of each image, numbered in the order of the WordNet ids.
    """

    tar: pathlib.Path
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: slice | np.ndarray) -> "Images":
        arrays = self.names, self.offsets, self.sizes, self.labels
        return Images(self.tar, *(array[index] for array in arrays))


def find_tars(folder: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the paths of the training and the validation tar.

    Raises:
      ValueError: if the folder is in a bucket.
      FileNotFoundError: if a tar is missing.
    """
    if storage.is_bucket(folder):
        raise ValueError(
            f"tars: expected a folder on a disk, since the images are read in random order, got "
            f"{folder}: copy {TRAIN_TAR} and {VALIDATION_TAR} from there"
        )
    paths = [pathlib.Path(folder).expanduser() / name for name in (TRAIN_TAR, VALIDATION_TAR)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{' and '.join(missing)}: no such file. {SOURCE}")
    return paths[0], paths[1]


def index_train(path: pathlib.Path, classes: int, count: int, progress: bool = False) -> Images:
    """Finds the training images: the tar holds a tar for each class, named by its WordNet id.

    Args:
      path: the training tar.
      classes: number of classes that it must hold.
      count: number of images that it must hold.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if the tar, or a tar within it, is damaged, or if the classes or the number of
        images are not as expected.
    """
    labels = _labels()
    with _tar_errors(path), tarfile.open(path, "r:") as outer:
        inner = [member for member in outer if member.isfile()]
    wnids = [posixpath.basename(member.name).removesuffix(".tar") for member in inner]
    if unknown := sorted(set(wnids) - set(labels)):
        raise _wrong(path, "tars of ImageNet's classes", f"also {first_names(unknown)}")
    if len(inner) != classes or len(set(wnids)) != classes:
        missing = first_names(sorted(set(labels) - set(wnids)))
        found = f"{len(inner)}, of {len(set(wnids))} classes; not there: {missing}"
        raise _wrong(path, f"tars of {classes} classes", found)

    def walk(member: tarfile.TarInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Each thread needs its own file object.
        with _tar_errors(path, f"{member.name} within as "), tarfile.open(path, "r:") as outer:
            part = outer.extractfile(member)
            with tarfile.open(fileobj=part, mode="r:") as tar:
                names, offsets, sizes = _walk(tar)
                return names, offsets + member.offset_data, sizes

    with readers() as pool:
        walked = pool.map(walk, inner)
        name = f"checking {path.name}"
        bar = tqdm.tqdm(walked, name, len(inner), unit=" classes", disable=not progress)
        parts = list(bar)
    targets = [np.full(len(part[0]), labels[wnid]) for wnid, part in zip(wnids, parts, strict=True)]
    names, offsets, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _counted(Images(path, names, offsets, sizes, np.concatenate(targets)), count)


def index_validation(path: pathlib.Path, count: int) -> Images:
    """Finds the validation images. Their labels are in a list that tfds ships, by image number.

    Args:
      path: the validation tar.
      count: number of images that it must hold, at most 50,000.

    Raises:
      ValueError: if the tar is damaged, or if the names or the number of images are not as
        expected.
    """
    with _tar_errors(path), tarfile.open(path, "r:") as tar:
        columns = _walk(tar)
    images = _counted(Images(path, *columns, np.zeros(len(columns[0]), np.int64)), count)
    expected = {b"ILSVRC2012_val_%08d.JPEG" % (i + 1) for i in range(count)}
    if wrong := sorted(expected.symmetric_difference(images.names.tolist())):
        found = first_names([name.decode() for name in wrong])
        raise _wrong(path, f"images numbered 1 to {count}", f"as missing or new: {found}")
    labels = _labels()
    by_number = [labels[wnid] for wnid in validation_wnids()]
    targets = [by_number[int(name[-13:-5]) - 1] for name in images.names.tolist()]
    return dataclasses.replace(images, labels=np.array(targets))


def validation_wnids() -> list[str]:
    """Returns the WordNet id of each of the 50,000 validation images, by number, from tfds."""
    return _tfds_lines("validation_labels.txt")


def as_rgb_jpeg(data: bytes) -> bytes:
    """Encodes a PNG or a CMYK JPEG again as RGB JPEG, quality 100; returns other JPEGs unchanged.

    The bytes are exactly those that tfds gets from TensorFlow's image operations. They decode with
    the fast DCT. RGB is the inverted colour inks times the inverted black ink; colour profiles are
    ignored. They encode with chroma subsampling 4:2:0 and 300 dots per inch.

    Raises:
      ValueError, OSError: if the bytes are neither JPEG nor PNG, or cannot be decoded.
    """
    from PIL import Image  # Pillow and simplejpeg are needed for 23 images only
    import simplejpeg

    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    elif _jpeg_components(data) == 4:
        light = simplejpeg.decode_jpeg(data, "CMYK", fastdct=True, strict=False).astype(np.int32)
        if "adobe" not in Image.open(io.BytesIO(data)).info:
            light = 255 - light  # only Adobe's files store the inks inverted, as light
        pixels = (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)
    else:
        return data
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=100, subsampling="4:2:0", dpi=(300, 300))
    return out.getvalue()


def encoded_by_tfds() -> set[str]:
    """Returns tfds' list of the training images that are CMYK or PNG."""
    module = tfds_module()
    return {*module.CMYK_IMAGES, *module.PNG_IMAGES}


def tfds_module() -> ModuleType:
    """Returns the module of tfds' own builder; importing and building need no TensorFlow."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    return imagenet2012_dataset_builder


@contextlib.contextmanager
def readers() -> Iterator[futures.Executor]:
    """Runs a pool of threads to read with; an error or an interrupt cancels the queued reads."""
    pool = futures.ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _walk(tar: tarfile.TarFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the names, offsets and sizes of the files of a tar, from its headers."""
    members = [member for member in tar if member.isfile()]
    names = [posixpath.basename(member.name).encode() for member in members]
    offsets = np.array([member.offset_data for member in members], np.int64)
    return np.array(names, "S"), offsets, np.array([member.size for member in members], np.int64)


def _counted(images: Images, count: int) -> Images:
    if len(images) != count:
        raise _wrong(images.tar, f"{count:,} images", f"{len(images):,}")
    names, times = np.unique(images.names, return_counts=True)
    if len(names) != count:
        twice = [name.decode() for name in names[times > 1].tolist()]
        raise _wrong(images.tar, "each file name once", f"more than once: {first_names(twice)}")
    return images


def _jpeg_components(data: bytes) -> int:
    """Returns the number of colour channels that a JPEG declares in its frame header."""
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while (position := data.find(b"\xff", position)) >= 0 and position + 10 <= len(data):
        marker = data[position + 1]
        if marker in (0x00, 0xFF):  # a stray byte, or padding
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[position + 9]
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
    raise ValueError("neither JPEG nor PNG")


@contextlib.contextmanager
def _tar_errors(path: pathlib.Path, part: str = "") -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise _wrong(path, f"{part}a whole, uncompressed tar", f"'{error}'") from error


def _wrong(path: pathlib.Path, expected: str, found: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected}; found {found}. The file has {path.stat().st_size:,} bytes, "
        f"the published one {_TAR_BYTES[path.name]:,}. {SOURCE}"
    )


def _labels() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(_tfds_lines("labels.txt"))}


@functools.cache
def _tfds_lines(name: str) -> list[str]:
    """Reads a list that tfds ships with imagenet2012: labels.txt or validation_labels.txt."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()
