"""Writes ImageNet from its two tars as a data set of tfds, without TensorFlow.

The result is what `tfds.builder("imagenet2012", file_format="array_record")` prepares: the same
files, the same metadata, and the same records in the same order (tfds shuffles by a hash of the
file name). tfds itself needs TensorFlow to prepare it, and disk space for a second copy of the
images. A bucket gets the same records as TFRecord, which can be read there.
"""

from concurrent import futures
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile

import numpy as np
import tqdm

from convit_jax import storage
from convit_jax.data.first_names import first_names
from convit_jax.data.imagenet import shard_files, tar_files
from convit_jax.data.tfds.prepared import file_format_for

log = logging.getLogger(__name__)

_NAME = "imagenet2012"
_INFO = "dataset_info.json"  # tfds' file, without which a folder is no data set
_STATE = "progress.json"  # lists the complete shards, beside them, until all are written
_Plan = dict[str, tuple[str, tar_files.Images]]  # shard's file name -> split, images in order


def prepare_imagenet(
    tars: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    classes: int = 1000,
    train_images: int = 1_281_167,
    validation_images: int = 50_000,
    train_shards: int = 1024,
    validation_shards: int = 64,
    progress: bool = True,
) -> pathlib.Path:
    """Writes ImageNet (ILSVRC2012) as the tfds data set imagenet2012.

    Both tars are checked before anything is written. The shards are then written to a folder
    `*.incomplete`, which gets its final name when it is complete. Until then nothing can be read.
    An interrupted run continues after the last complete shard when it is started again, and writes
    the same bytes. Memory holds one shard (about 140 MB) and the index, below 1 GB in all. Images
    are read from the tars in random order. This takes under half an hour from a solid-state disk
    and hours from a hard disk.

    On a disk the shards are ArrayRecord. In a bucket they are TFRecord, which is read there by
    ranges of bytes. A bucket cannot rename a folder, so the shards get their final names at once,
    each from the temporary folder of the system, and dataset_info.json is written last. Without it
    neither tfds nor this project sees a data set.

    As in tfds, the training images that are CMYK (22) or PNG (1) are encoded again as RGB JPEG of
    quality 100, and all others keep their bytes. The validation labels are those that tfds ships.

    Args:
      tars: folder that holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
      data_dir: folder of the tfds data sets, on a disk or in a bucket; takes about 148 GB.
      classes: number of classes that the training tar must hold.
      train_images: number of images that the training tar must hold.
      validation_images: number of images that the validation tar must hold.
      train_shards: number of training shards to write; the default is tfds' number.
      validation_shards: number of validation shards to write; the default is tfds' number.
      progress: whether to show progress bars.

    Returns:
      The folder of the version, for `tfds.builder_from_directory`. If it exists already, nothing
      is written.

    Raises:
      FileNotFoundError: if a tar is missing.
      ValueError: if a tar is damaged or does not hold what it should, if the incomplete folder was
        begun with other tars or another number of shards, if `tars` is in a bucket, or if
        `data_dir` is a URL with a character of patterns.
      FileExistsError: if another data set is stored in the folder of the version.
      BlockingIOError: if another run is writing there.
      OSError: if the disk has too little space, or fails.
    """
    counts = {"train": train_images, "validation": validation_images}
    shards = {"train": train_shards, "validation": validation_shards}
    for split, count in counts.items():
        if not 1 <= shards[split] <= count:
            raise ValueError(f"{split}: expected 1 to {count} shards, got {shards[split]}")
    version = str(tar_files.tfds_module().Builder.VERSION)
    root = storage.as_path(data_dir)
    storage.refuse_pattern(root, "data_dir")
    final = root / _NAME / version
    if final.exists() and not _is_unfinished(final):
        _check_finished(final, counts)
        return final
    train_tar, validation_tar = tar_files.find_tars(tars)
    validation = tar_files.index_validation(validation_tar, validation_images)
    train = tar_files.index_train(train_tar, classes, train_images, progress)
    plan = _plan("train", train, train_shards, file_format_for(final))
    plan |= _plan("validation", validation, validation_shards, file_format_for(final))
    _write(final, plan, progress)
    return final


def tfds_order(names: np.ndarray, split: str) -> np.ndarray:
    """Returns the order of the records: by the MD5 sum of split and file name, as in tfds.

    Args:
      names: (n,) bytes, the file names.
      split: name of the split, which salts the hash.

    Returns:
      (n,) int64, positions in `names` in the order of the records.
    """
    salted = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(name: bytes) -> bytes:
        state = salted.copy()
        state.update(name)
        return state.digest()

    digests = np.frombuffer(b"".join(map(digest, names.tolist())), ">u8").reshape(-1, 2)
    return np.lexsort((digests[:, 1], digests[:, 0]))


def record(image: bytes, label: int, file_name: bytes) -> bytes:
    """Returns a serialised tf.train.Example; equal arguments give equal bytes."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def raw(value: bytes) -> tf_feature_pb2.Feature:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))

    number = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[label]))
    feature = {"image": raw(image), "label": number, "file_name": raw(file_name)}
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    return example.SerializeToString(deterministic=True)


def write_metadata(
    folder: pathlib.Path,
    splits: dict[str, tuple[list[int], int]],
    file_format: str,
) -> None:
    """Writes dataset_info.json, features.json and the label names of imagenet2012 with tfds.

    Args:
      folder: the folder of the shards.
      splits: {split: (number of records of each shard, number of bytes of all records)}.
      file_format: "array_record" or "tfrecord".
    """
    import tensorflow_datasets as tfds

    # Only the builder's features and description are used: its own folder is never made.
    builder = tar_files.tfds_module().Builder(data_dir=folder / "none", file_format=file_format)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=_NAME, filetype_suffix=file_format
    )
    infos = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=lengths, num_bytes=size, filename_template=template
        )
        for name, (lengths, size) in splits.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(folder)


def _plan(split: str, images: tar_files.Images, shards: int, file_format: str) -> _Plan:
    ordered = images[tfds_order(images.names, split)]
    bounds = [round(len(ordered) * i / shards) for i in range(shards + 1)]  # as tfds rounds
    return {
        f"{_NAME}-{split}.{file_format}-{i:05d}-of-{shards:05d}": (
            split,
            ordered[bounds[i] : bounds[i + 1]],
        )
        for i in range(shards)
    }


def _write(final: pathlib.Path, plan: _Plan, progress: bool) -> None:
    """Writes shards and metadata into a folder beside `final`, then renames it to `final`.

    A bucket gets them at `final`, the metadata last. It has no locks: two runs write equal shards.
    """
    if storage.is_bucket(final):
        with tempfile.TemporaryDirectory(prefix="convit") as folder:
            done = _write_shards(final, plan, progress)
            _write_all_metadata(pathlib.Path(folder), plan, done, file_format_for(final))
            names = sorted(os.listdir(folder), key=lambda name: (name == _INFO, name))
            for name in names:
                with storage.whole_file(final / name) as unfinished:
                    unfinished.write_bytes(pathlib.Path(folder, name).read_bytes())
        (final / _STATE).unlink(missing_ok=True)  # another run may have finished first
        return
    incomplete = final.with_name(final.name + ".incomplete")
    incomplete.mkdir(parents=True, exist_ok=True)
    with storage.locked(incomplete) as is_locked:
        # Left by a run that was killed. Without a lock another run may be writing them.
        for unfinished in incomplete.glob("*.part") if is_locked else ():
            if unfinished.is_file():
                unfinished.unlink()
        done = _write_shards(incomplete, plan, progress)
        _write_all_metadata(incomplete, plan, done, file_format_for(final))
        os.rename(incomplete, final)
        (final / _STATE).unlink()


def _write_all_metadata(
    folder: pathlib.Path, plan: _Plan, done: dict[str, dict], file_format: str
) -> None:
    """Writes the metadata of the shards that `_write_shards` wrote."""
    _compare_encoded_anew(plan, done)
    splits = {}
    for split in ("train", "validation"):
        names = [name for name, (of, _) in plan.items() if of == split]
        lengths = [len(plan[name][1]) for name in names]
        splits[split] = lengths, sum(done[name]["bytes"] for name in names)
    write_metadata(folder, splits, file_format)


def _write_shards(folder: pathlib.Path, plan: _Plan, progress: bool) -> dict[str, dict]:
    """Writes the missing shards; returns {shard: its bytes and the names of re-encoded images}."""
    source = _fingerprint(plan)
    done = _complete_shards(folder, plan, source)
    _check_room(folder, [images for name, (_, images) in plan.items() if name not in done])
    total = sum(len(images) for _, images in plan.values())
    kept = sum(len(plan[name][1]) for name in done)
    if kept:
        log.info("%s: continuing after %d of %d images", folder, kept, total)
    _write_state(folder, source, done)
    bar = tqdm.tqdm(
        desc=f"writing {_NAME}", total=total, initial=kept, unit=" images", disable=not progress
    )
    with bar, tar_files.readers() as pool:
        for name, (split, images) in plan.items():
            if name in done:
                continue
            with storage.whole_file(folder / name) as unfinished:
                done[name] = _write_shard(
                    unfinished, images, split == "train", pool, file_format_for(folder)
                )
            _write_state(folder, source, done)
            bar.update(len(images))
    return done


def _write_state(folder: pathlib.Path, source: str, done: dict[str, dict]) -> None:
    storage.write_text(folder / _STATE, json.dumps({"source": source, "shards": done}))


def _complete_shards(folder: pathlib.Path, plan: _Plan, source: str) -> dict[str, dict]:
    """Returns the entries of the shards that an earlier run completed."""
    path = folder / _STATE
    if not path.exists():
        return {}
    state = json.loads(path.read_text())
    if state["source"] != source:
        raise ValueError(
            f"{folder}: expected shards of these tars, found shards of other tars or in another "
            "number. Delete the folder to begin anew, or continue with the tars it was begun with"
        )
    in_bucket = storage.is_bucket(folder)
    there = storage.children(str(folder)).files if in_bucket else {}

    def is_whole(name: str, entry: dict) -> bool:
        if in_bucket:
            return name in there and there[name].size == entry["size"]
        return shard_files.is_whole(folder / name, len(plan[name][1]), file_format_for(folder))

    return {name: entry for name, entry in state["shards"].items() if is_whole(name, entry)}


def _write_shard(
    path: pathlib.Path,
    images: tar_files.Images,
    encode_anew: bool,
    pool: futures.Executor,
    file_format: str,
) -> dict:
    """Writes one shard; returns the bytes of its records, its size, names of re-encoded images."""
    total, anew = 0, []
    file = os.open(images.tar, os.O_RDONLY)

    def read(offset: int, size: int) -> bytes:
        content = os.pread(file, size, offset)
        if len(content) != size:
            raise OSError(f"{images.tar}: became shorter since it was checked")
        return content

    try:
        writer = shard_files.open_writer(path, file_format)
        contents = pool.map(read, images.offsets.tolist(), images.sizes.tolist())
        for name, label, content in zip(
            images.names.tolist(), images.labels.tolist(), contents, strict=True
        ):
            image = content
            if encode_anew:
                image = _as_rgb_jpeg(content, f"{images.tar}: {name.decode()}")
            if image is not content:
                anew.append(name.decode())
            example = record(image, label, name)
            total += len(example)
            writer.write(example)
        writer.close()
    except RuntimeError as error:  # ArrayRecord raises it if the disk is full, and names the file
        raise OSError(f"{error}: mend it, and start again to continue") from error
    finally:
        os.close(file)
    if not shard_files.is_whole(path, len(images), file_format):
        raise OSError(f"{path}: expected {len(images)} records, found fewer: is the disk full?")
    return {"bytes": total, "size": path.stat().st_size, "encoded_anew": anew}


def _as_rgb_jpeg(content: bytes, name: str) -> bytes:
    try:
        return tar_files.as_rgb_jpeg(content)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: damaged ({error}). {tar_files.SOURCE}") from error


def _is_unfinished(final: pathlib.Path) -> bool:
    """Returns whether a bucket has a part of the shards there; a disk never does."""
    in_bucket = storage.is_bucket(final)
    return in_bucket and (final / _STATE).exists() and not (final / _INFO).exists()


def _check_finished(final: pathlib.Path, counts: dict[str, int]) -> None:
    """Raises FileExistsError unless `final` holds the data set that would be written."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(final).info
        sizes = {name: split.num_examples for name, split in info.splits.items()}
        found = f"{sizes} as {info.file_format.value}"
    except Exception as error:  # tfds raises many kinds of errors for a folder it cannot read
        if outage := storage.outage_behind(error):
            raise outage from None  # what the folder holds is not known
        found = f"nothing that tfds reads ({error})"
    if found != f"{counts} as {file_format_for(final)}":
        raise FileExistsError(
            f"{final}: expected no folder, or {counts} as {file_format_for(final)}; found {found}. "
            "Use it as it is, move it away, or choose another data_dir"
        )
    (final / _STATE).unlink(missing_ok=True)  # left if a run was killed just before its end


def _check_room(folder: pathlib.Path, missing: list[tar_files.Images]) -> None:
    """Raises OSError if the disk has too little free space for the missing shards.

    A bucket has room for all; one shard at a time is on the disk of the temporary folder.
    """
    # Headers, labels and names take some 200 bytes a record. Shards are padded to 64 KiB blocks.
    sizes = [int(images.sizes.sum()) + 300 * len(images) + 2**17 for images in missing]
    needed = sum(sizes)
    if storage.is_bucket(folder):
        folder, needed = pathlib.Path(tempfile.gettempdir()), max(sizes, default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"expected {needed:,} bytes of free disk for what is still to be written, found "
            f"{free:,}: make room, or choose another data_dir",
            str(folder),
        )


def _compare_encoded_anew(plan: _Plan, done: dict[str, dict]) -> None:
    """Warns if the images that were encoded again are not those that tfds lists."""
    listed = set()
    for _, images in plan.values():
        listed.update(tar_files.encoded_by_tfds().intersection(map(bytes.decode, images.names)))
    found = {name for entry in done.values() for name in entry["encoded_anew"]}
    log.info("encoded again as RGB JPEG: %d images", len(found))
    if found != listed:
        log.warning(
            "CMYK or PNG, but not on tfds' list: %s; on the list, but not CMYK or PNG here: %s",
            first_names(sorted(found - listed)) or "none",
            first_names(sorted(listed - found)) or "none",
        )


def _fingerprint(plan: _Plan) -> str:
    """Returns a hash of which image goes into which shard; it reads no image."""
    state = hashlib.sha256()
    for name, (_, images) in plan.items():
        state.update(name.encode())
        for array in (images.names, images.offsets, images.sizes, images.labels):
            state.update(array.tobytes())
    return state.hexdigest()
