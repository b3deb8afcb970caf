"""What identifies the data of a run, and how differences are said."""

import json

import numpy as np
from PIL import Image
import pytest

from convit_jax.data.arrays import digits
from convit_jax.data.identity import (
    Identity,
    class_difference,
    image_difference,
    process_differences,
)
from convit_jax.data.open import open_source
from convit_jax.data.source import subset


def write(folder, names=("cat/0", "cat/1", "dog/0", "dog/1")):
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def folder_identity(folder):
    return Identity.of(open_source(f"folder:{folder}", "train"))


def test_the_same_images_elsewhere_are_the_same_data(tmp_path):
    for place in ("here", "there"):
        write(tmp_path / place / "train")
    here, there = (folder_identity(tmp_path / place).summary() for place in ("here", "there"))
    assert here.pop("description") != there.pop("description")
    assert here == there
    assert here["images"] == 4
    assert here["class_names"] == ["cat", "dog"]


def test_a_file_or_a_class_of_another_name_is_other_data(tmp_path):
    write(tmp_path / "a" / "train")
    write(tmp_path / "b" / "train", ("cat/0", "cat/2", "dog/0", "dog/1"))
    write(tmp_path / "c" / "train", ("cow/0", "cow/1", "dog/0", "dog/1"))
    a, b, c = (folder_identity(tmp_path / name) for name in "abc")
    assert len({found.summary()["hash"] for found in (a, b, c)}) == 3
    assert image_difference(a.fingerprints, b.fingerprints) == ": 1 more and 1 fewer"
    assert image_difference(a.fingerprints, c.fingerprints) == ": 2 more and 2 fewer"
    assert image_difference(a.fingerprints, a.fingerprints[::-1]) == ": in another order"
    assert image_difference(None, b.fingerprints) == ": which of them differ is not known"


def test_fingerprints_of_a_subset_are_those_of_its_images():
    whole = digits("train")
    part = subset(whole, 0.25, None)
    assert len(np.unique(whole.fingerprints())) == len(whole)
    np.testing.assert_array_equal(part.fingerprints(), whole.fingerprints()[part.indices])


@pytest.mark.parametrize(
    ("here", "text"),
    [
        ("abc", None),
        ("abd", "3 classes instead of 3: 'c' missing, 'd' new"),
        ("abcd", "4 classes instead of 3: 'd' new"),
        ("ab", "2 classes instead of 3: 'c' missing"),
        ("acb", "the same 3 classes in another order: class 1 is 'c' instead of 'b'"),
        ("abcdefghij", "10 classes instead of 3: 'd', 'e', 'f', 'g', 'h' and 2 more new"),
    ],
)
def test_classes_are_compared_by_name_and_order(here, text):
    assert class_difference(tuple("abc"), tuple(here)) == text


def test_differences_between_processes_name_the_process():
    def data(images=8, digest="x", classes=("cat", "dog")):
        same = {"images": 2, "hash": "y", "class_names": ["cat", "dog"]}
        train = {"images": images, "hash": digest, "class_names": list(classes)}
        return json.dumps({"train": train, "test": same})

    others = [data(), data(7), data(8, "z"), data(classes=("cow", "dog"))]
    assert list(process_differences([data(), *others])) == [
        "train: process 2 has 7 images, process 0 8",
        "train: process 3 has other images than process 0, though equally many",
        "train: process 4 has 2 classes instead of 2: 'cat' missing, 'cow' new, compared with "
        "process 0",
    ]
