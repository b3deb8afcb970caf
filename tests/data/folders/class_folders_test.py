"""Class folders: images are labelled by their folders, divided by their names, and none is lost."""

import io
import os
import pathlib
import shutil

from image_files import classes, make_files
import numpy as np
from PIL import Image
import pytest
import reference

from convit_jax import recipe, saved_config
from convit_jax.data import held_out
from convit_jax.data.images.decode import decode
from convit_jax.data.open import SPLITS, open_source
from convit_jax.data.source import check_images, describe


def opened(path, split="train", **options):
    return open_source(f"folder:{path}", split, **options)


def names(source):
    return [os.fsdecode(name) for name in source.names]


def test_folders_are_read_as_image_folder_reads_them(tmp_path):
    reference.import_timm()
    from torchvision import datasets

    make_files(
        tmp_path,
        *("train/b/2.jpg", "train/b/10.JPEG", "train/b/x/3.Png", "train/b/notes.txt"),
        *("train/B/1.webp", "train/B/a.tiff", "train/a b/é.bmp", "train/10/1.ppm"),
        *("train/10/z/1.pgm", "train/10/a/2.tif", "train/10/a b/3.jpg", "train/README.md"),
        "val/b/1.jpg",
    )
    ours = opened(tmp_path)
    theirs = datasets.ImageFolder(tmp_path / "train")
    assert list(ours.class_names) == theirs.classes
    assert [(ours[i]["name"], ours[i]["label"]) for i in range(len(ours))] == theirs.samples
    assert ours[0]["image"] == pathlib.Path(ours[0]["name"]).read_bytes()
    # val/ has only one class, which keeps the number that it has in train/.
    assert opened(tmp_path, "test")[0]["label"] == 3


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_an_evaluation_needs_no_training_images(tmp_path, name):
    make_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{name}/a/9.jpg", f"{name}/b/8.jpg")
    assert names(opened(tmp_path, "test")) == ["a/9.jpg", "b/8.jpg"]
    shutil.rmtree(tmp_path / "train")
    assert len(opened(tmp_path, "test")) == 2
    with pytest.raises(
        FileNotFoundError, match=f"got {name}/; expected train/ for the train split"
    ):
        opened(tmp_path)


def test_which_images_are_held_out_is_pinned():
    """A change of the rule would move images between training and evaluation of every run."""
    files = [f"cat/{i:03}.jpg" for i in range(40)]
    out = held_out.by_hash(map(os.fsencode, files), 0.1)
    assert [file for file, is_out in zip(files, out, strict=True) if is_out] == [
        "cat/003.jpg", "cat/016.jpg", "cat/025.jpg", "cat/030.jpg", "cat/038.jpg",
    ]  # fmt: skip
    assert held_out.by_hash([b"\xff/\xc3\xa9.jpg"], 0.5).tolist() == [False]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.8])
def test_one_file_less_moves_no_other_file(tmp_path, fraction):
    make_files(tmp_path, *(f"{c}/{i:03}.jpg" for c, n in (("a", 30), ("b", 70)) for i in range(n)))
    before = [set(names(opened(tmp_path, split, val_fraction=fraction))) for split in SPLITS]
    assert not before[0] & before[1]
    assert len(before[0] | before[1]) == 100
    assert abs(len(before[1]) - 100 * fraction) < 15
    (tmp_path / "a/003.jpg").unlink()
    after = [set(names(opened(tmp_path, split, val_fraction=fraction))) for split in SPLITS]
    assert after == [part - {"a/003.jpg"} for part in before]


def test_a_fraction_of_one_leaves_all_images_for_the_test_split(tmp_path):
    make_files(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    source = opened(tmp_path, "test", val_fraction=1.0)
    assert source.labels.tolist() == [0, 0, 1]
    assert source.description.endswith(", all images")


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.8])
def test_the_rule_of_earlier_versions_spreads_what_is_held_out(tmp_path, fraction):
    counts = {"a": 5, "b": 10, "c": 33}
    for name, count in counts.items():
        make_files(tmp_path, *(f"{name}/{i:03}.jpg" for i in range(count)))
    make_files(tmp_path, "c/000.gif", "c/000.jfif")  # earlier versions did not read these
    options = {"val_fraction": fraction, "held_out": "spread"}
    train, test = (opened(tmp_path, split, **options) for split in SPLITS)
    assert not {*names(train)} & {*names(test)}
    assert len(train) + len(test) == 48
    for count, out in zip(counts.values(), np.bincount(test.labels), strict=True):
        assert abs(out - count * fraction) <= 0.5
    if fraction == 0.1:  # every tenth
        c = [int(name[-7:-4]) for name in names(test) if name.startswith("c/")]
        assert c == [4, 14, 24]
    with pytest.raises(ValueError, match=r"data\.held_out: expected one of .* got 'random'"):
        opened(tmp_path, held_out="random")


def test_the_rule_of_earlier_versions_evaluates_the_same_folder(tmp_path):
    make_files(tmp_path, *classes("train"), *classes("valid"), *classes("test", "dog"))
    assert len(opened(tmp_path, "test")) == 6
    assert len(opened(tmp_path, "test", held_out="spread")) == 3  # they did not know valid/
    make_files(tmp_path, *classes("validation", "cat", 2))
    assert len(opened(tmp_path, "test", held_out="spread")) == 2
    levels = tmp_path / "levels"
    make_files(levels, *classes("amazon"), *classes("webcam"))  # they took these for classes
    assert opened(levels, held_out="spread").class_names == ("amazon", "webcam")


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def refused(error, message, split="train", path=tmp_path, **options):
        with pytest.raises(error, match=message) as caught:
            opened(path, split, **options)
        assert str(path) in str(caught.value)

    refused(FileNotFoundError, "no folder", path=tmp_path / "nowhere")
    refused(ValueError, r"expected at least two class folders, got \[\]")
    make_files(tmp_path, "a/1.jpg", "b/readme.txt")
    refused(ValueError, r"b: a class folder without images .*; it holds 1 \.txt; remove it or fill")
    make_files(tmp_path, "b/1.jpg")
    refused(ValueError, "too few images for a test split.*change data.val_fraction", "test")
    with pytest.raises(ValueError, match=r"data\.val_fraction: expected 0 < fraction < 1, got 1"):
        opened(tmp_path, "train", val_fraction=1)
    refused(ValueError, "leaves none for training", val_fraction=0.99)
    divided = tmp_path / "divided"
    make_files(divided, "train/a/1.jpg", "train/b/1.jpg")
    message = rf"expected val/ or validation/ or test/.*data\.source=folder:{divided}/train holds"
    refused(FileNotFoundError, message, "test", path=divided)
    make_files(divided, "val/a/1.jpg", "val/c/1.jpg")
    refused(ValueError, r"val: classes that train/ lacks: \['c'\]", "test", path=divided)
    make_files(tmp_path / "single", "train/a/1.jpg", "train/2.jpg")
    message = r"two class folders, got \['a'\] and 1 image in no class"
    refused(ValueError, message, path=tmp_path / "single")


LEFT_BEHIND = (
    "__MACOSX/a/._1.jpg", ".DS_Store", ".git/a/1.jpg", "@eaDir/a/1.jpg", "lost+found/1.jpg",
    "a/._1.jpg", "a/Thumbs.db", "a/.ipynb_checkpoints/1-checkpoint.jpg", "a/deep/__MACOSX/2.jpg",
    "b/desktop.ini", "b/notes.txt", "b/more.TXT", "b/LICENSE", "$RECYCLE.BIN/x.jpg",
)  # fmt: skip


def test_what_systems_leave_behind_is_counted_and_is_neither_class_nor_image(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("", "a b", 30), "a/deep/2.jpg", "loose.jpg", *LEFT_BEHIND)
    train, test = (opened(tmp_path, split) for split in SPLITS)
    assert train.class_names == test.class_names == ("a", "b")
    assert {*names(train), *names(test)} == {*classes("", "a b", 30), "a/deep/2.jpg"}
    assert len(caplog.messages) == 1  # both splits leave out the same
    start, _, kinds = caplog.messages[0].partition(": left out: ")
    assert start == str(tmp_path)
    assert kinds == (
        "2 .txt, 2 hidden files, 2 hidden folders, 2 of __MACOSX, 1 file without a suffix, "
        "1 image beside the class folders, 1 of $RECYCLE.BIN, 1 of @eaDir, 1 of Thumbs.db, "
        "1 of desktop.ini, 1 of lost+found"
    )
    make_files(tmp_path, *(f"a/{i}.{i:03}" for i in range(10)))
    opened(tmp_path)
    assert caplog.messages[1].endswith(", 9 of other kinds")


def test_what_lies_beside_the_class_folders_of_a_split_is_counted_too(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("train"), *classes("val"), "train/.DS_Store", "val/labels.csv")
    make_files(tmp_path, "README.md", "train/cat/notes.md")
    assert len(opened(tmp_path)) == len(opened(tmp_path, "test")) == 6
    assert caplog.messages == [
        f"{tmp_path}/train: left out: 2 .md, 1 hidden file",
        f"{tmp_path}/val: left out: 1 .csv, 1 .md",
    ]


def test_a_link_that_leads_back_up_is_not_followed(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("train"), *classes("val"), "elsewhere/sub/9.jpg")
    (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train")
    (tmp_path / "train/cat/more").symlink_to(tmp_path / "elsewhere/sub")
    source = opened(tmp_path)
    assert names(source) == [
        "cat/000.jpg", "cat/001.jpg", "cat/002.jpg", "cat/more/9.jpg", *classes("", "dog"),
    ]  # fmt: skip
    assert "train: left out: 1 link to a folder above" in caplog.text


def test_a_jfif_is_a_jpeg_and_a_gif_is_its_first_frame(tmp_path):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)) for _ in range(3)]
    for name in ("train/a/1.gif", "train/b/1.JFIF", "val/a/1.GIF"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith("gif"):
            frames[0].save(tmp_path / name, "GIF", save_all=True, append_images=frames[1:])
        else:
            frames[0].save(tmp_path / name, "JPEG", quality=95)
    source = opened(tmp_path)
    assert names(source) == ["a/1.gif", "b/1.JFIF"]
    assert check_images(source)[1] == []  # none is corrupt
    first = Image.open(io.BytesIO(source[0]["image"]))
    np.testing.assert_array_equal(decode(source[0]["image"]), np.asarray(first.convert("RGB")))
    error = decode(source[0]["image"]).astype(int) - np.asarray(frames[0])
    assert abs(error).mean() < 10  # a palette of 256 colours
    assert decode(source[1]["image"]).shape == (8, 9, 3)
    assert len(opened(tmp_path, "test")) == 1


def test_classes_are_numbered_as_asked(tmp_path):
    folders = "10 2 1 b10 b2 B1 ä"
    make_files(tmp_path, *classes("train", folders), *classes("val", "2 10"))
    (tmp_path / "order.txt").write_bytes("\ufeffb2\r\nä\n1\n\n2\nb10\nB1\n10\n".encode())
    for order, expected in (
        ("sorted", "1 10 2 B1 b10 b2 ä"),
        ("natural", "1 2 10 B1 b2 b10 ä"),
        (str(tmp_path / "order.txt"), "b2 ä 1 2 b10 B1 10"),
    ):
        train, test = (opened(tmp_path, split, class_order=order) for split in SPLITS)
        assert " ".join(train.class_names) == " ".join(test.class_names) == expected
        assert {(name.split("/")[0], int(label)) for name, label in zip(
            names(train), train.labels, strict=True)
        } == {(name, i) for i, name in enumerate(expected.split())}  # fmt: skip
        assert {*test.labels.tolist()} == {expected.split().index(name) for name in ("2", "10")}


def test_a_list_of_classes_must_be_the_folders(tmp_path):
    make_files(tmp_path, *classes("", "a b c"))
    order = tmp_path / "order.txt"
    for text, message in (
        ("a\nb\n", r"folders that the list lacks: 'c'"),
        ("a\nb\nc\nd\n", r"names without a folder: 'd'"),
        ("a\nb\nc\nb\n", r"names listed twice: 'b'"),
        ("a \nb\nc\n", r"list lacks: 'a'; names without a folder: 'a '"),
    ):
        order.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            opened(tmp_path, class_order=str(order))
        assert f"data.class_order: expected {order} to list the 3 class folders" in str(
            caught.value
        )
    with pytest.raises(FileNotFoundError, match=r"expected sorted or natural or a file.*'natr"):
        opened(tmp_path, class_order="natrual")
    with pytest.raises(ValueError, match=r"data\.class_order: expected 'sorted' for .*=digits"):
        open_source("digits", "train", class_order="natural")


def test_a_run_of_an_earlier_version_keeps_its_division():
    config = recipe.get_config()
    config.data.source = "folder:pictures"
    saved = saved_config.to_json(config)
    del saved["data"]["held_out"]
    for version in (1, 2):
        old = saved_config.from_json(saved | {"format_version": version}, "config.json")
        assert old.data.held_out == "spread"
        assert saved_config.to_json(old)["format_version"] == saved_config.FORMAT_VERSION
        # The command that started the run names no rule. The run goes on with its own.
        again = config.copy_and_resolve_references()
        (text,) = saved_config.keep_division(old, again)
        assert text.startswith("data.held_out: 'spread', as the run has it, not 'hash'")
        assert len(saved_config.keep_reading(old, again)) == 2  # data.exif and data.alpha
        assert saved_config.differences(old, again) == {}
        assert saved_config.keep_division(old, again) == []
    other = recipe.get_config()
    old.data.source, other.data.source = ("tfds:imagenet2012",) * 2
    assert saved_config.keep_division(old, other) == []  # its splits are its own: nothing to say
    saved_config.keep_reading(old, other)
    assert saved_config.differences(old, other) == {}
    new = saved_config.from_json(saved | {"format_version": 3}, "config.json")
    assert new.data.held_out == "hash"


def test_the_description_says_how_images_are_held_out(tmp_path):
    make_files(tmp_path, *classes("", "a b", 40))
    for rule, text in (("hash", "by the hash of CLASS/FILE"), ("spread", "spread over the")):
        line = describe(opened(tmp_path, "test", held_out=rule))
        assert f"class folders in {tmp_path}, about 10% of each class held out {text}" in line
        assert "test part: " in line
