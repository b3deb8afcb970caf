"""Reads files that were damaged at random, and prints what came of it as JSON.

A process of its own, since a damaged file may crash the code that reads it:
python tests/damaged_files.py FOLDER COUNT
"""

import collections
import contextlib
import json
import pathlib
import sys

from array_record.python import array_record_module
import numpy as np
from PIL import Image

from convit_jax import storage
from convit_jax.data.batches.gather import transformed
from convit_jax.data.folders.class_folders import FolderSource
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.data.tfds import records
from convit_jax.data.tfds.records import masked_crc32c

RECORDS = 4


def payload_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(500)


def make_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns {name: whole file} of a JPEG, a PNG, a TFRecord shard and an ArrayRecord shard."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(pixels).save(folder / name)
    payloads = [payload_of(number) for number in range(RECORDS)]
    with open(folder / "a.tfrecord", "wb") as file:
        for payload in payloads:
            for part in (len(payload).to_bytes(8, "little"), payload):
                file.write(part + masked_crc32c(part).to_bytes(4, "little"))
    writer = array_record_module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    names = ("a.jpg", "a.png", "a.tfrecord", "a.array_record")
    return {name: (folder / name).read_bytes() for name in names}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file with bytes flipped, cut, changed in the header, left out or inserted."""
    changed, place = bytearray(data), int(rng.integers(len(data)))
    match rng.integers(5):
        case 0:
            for i in rng.integers(len(data), size=3):
                changed[i] ^= 1 << int(rng.integers(8))
        case 1:
            del changed[place:]
        case 2:  # a length or another field of the header
            place = int(rng.integers(min(200, len(data) - 4)))
            changed[place : place + 4] = [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)][place % 3]
        case 3:
            del changed[place : place + int(rng.integers(1, 40))]
        case _:
            changed[place:place] = rng.bytes(20)
    return bytes(changed)


def read(path: pathlib.Path) -> None:
    """Reads a file; raises AssertionError if it is read wrongly.

    Nothing can be said about damage to a JPEG that Pillow refuses.
    """
    if path.suffix == ".tfrecord" or path.suffix == ".array_record":
        paths, counts = [str(path)], [RECORDS]
        shards: records.Records
        if path.suffix == ".tfrecord":
            shards = records.open_tfrecords(paths, counts, storage.versions(paths))
        else:
            shards = records.open_array_records(paths, counts)
        for number in range(RECORDS):
            assert shards[number] == payload_of(number)
        return
    names, labels = np.array([path.name.encode()]), np.zeros(1, np.int32)
    source = FolderSource(str(path.parent), names, labels, ("a",), "")
    image, _ = transformed(source, 0, EvalTransform(32))
    assert image.shape == (32, 32, 3)
    with contextlib.suppress(OSError, SyntaxError), Image.open(path) as picture:
        expected = EvalTransform(32)(np.asarray(picture.convert("RGB")))
        np.testing.assert_array_equal(image, expected)


def main(folder: pathlib.Path, count: int) -> None:
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for name, whole in make_files(folder).items():
        path = folder / name
        read(path)
        for number in range(count):
            path = folder / f"{number}{pathlib.Path(name).suffix}"
            path.write_bytes(damaged(whole, rng))
            try:
                read(path)
                outcomes[f"{path.suffix} read"] += 1
            except (ValueError, OSError) as error:
                named = "refused" if str(path) in str(error) else f"refused without name: {error}"
                outcomes[f"{path.suffix} {named}"] += 1
    # getrusage would include the memory of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    memory = int(status.partition("VmHWM:")[2].split()[0])  # kB
    print(json.dumps({"outcomes": outcomes, "memory": memory * 1024}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
