"""Layouts of folders as people have them: understood, or refused with what is there."""

import os

from image_files import classes, make_files
import numpy as np
import pytest

from convit_jax.data.imagenet import tar_files
from convit_jax.data.open import open_source


def read(path, split="train", **options):
    """Returns the folder that is read, relative to `path`, and {file: class}."""
    source = open_source(f"folder:{path}", split, **options)
    labels = [source.class_names[label] for label in source.labels]
    files = [os.fsdecode(name) for name in source.names]
    return os.path.relpath(source.root, path), dict(zip(files, labels, strict=True))


def folders_read(path, **options):
    return tuple(read(path, split, **options)[0] for split in ("train", "test"))


def refusal(path, split="train", **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_source(f"folder:{path}", split, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"), ("train", "validation"), ("train", "valid"), ("train", "test"),
        ("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing"), ("Training", "Validation"),
        ("training_set", "test_set"), ("train-set", "valid set"), ("train_data", "test_data"),
    ],
)  # fmt: skip
def test_splits_are_known_by_their_names(tmp_path, caplog, train, test):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes(train), *classes(test, "dog"))
    folders_read(tmp_path, val_fraction=1.0)  # an evaluation of weights, without a run
    assert "chooses the best checkpoint" not in caplog.text
    assert folders_read(tmp_path) == (train, test)
    assert read(tmp_path, "test")[1] == {f"dog/{i:03}.jpg": "dog" for i in range(3)}
    said = f"{tmp_path / test} chooses the best checkpoint of a run, as there is no val/"
    assert caplog.text.count(said) == (test.lower().startswith("test"))


@pytest.mark.parametrize("above", ["", "ILSVRC/"])
def test_imagenet_as_kaggle_packs_it_is_found_below_its_annotations(tmp_path, above):
    images = f"{above}Data/CLS-LOC"
    make_files(
        tmp_path,
        *classes(f"{images}/train"),
        *classes(f"{images}/val"),
        f"{above}Annotations/CLS-LOC/val/1.xml",
        f"{above}ImageSets/CLS-LOC/val.txt",
    )
    assert folders_read(tmp_path) == (f"{images}/train", f"{images}/val")


def test_val_is_taken_before_test_and_what_is_not_read_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("train"), *classes("valid"), *classes("test"), "extra/1.jpg")
    assert folders_read(tmp_path) == ("train", "valid")
    assert caplog.messages == [
        f"{tmp_path}: training reads train/, evaluation reads valid/; not read: extra/, test/"
    ]
    make_files(tmp_path, *classes("val"))
    assert folders_read(tmp_path) == ("train", "val")
    assert folders_read(tmp_path, test_split="test") == ("train", "test")
    assert "optimistic" not in caplog.text


@pytest.mark.parametrize("above", ["flowers", "a/b", "test"])
def test_a_folder_too_many_is_gone_down_with_a_line(tmp_path, caplog, above):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes(f"{above}/train"), *classes(f"{above}/val"), "__MACOSX/x/._1.jpg")
    assert folders_read(tmp_path) == (f"{above}/train", f"{above}/val")
    assert caplog.text.count(f"{tmp_path}: reading {tmp_path / above}") == 1
    assert caplog.text.count("left out: 1 of __MACOSX") == 2  # one line a split


def test_class_folders_in_one_folder_too_many(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("flowers", "daisy rose", 40))
    assert folders_read(tmp_path) == ("flowers", "flowers")
    assert caplog.messages == [f"{tmp_path}: reading {tmp_path}/flowers"]


def test_a_folder_too_many_in_each_split(tmp_path):
    make_files(tmp_path, *classes("train/train"), *classes("val/val", "dog"), "test/test/1.jpg")
    assert folders_read(tmp_path) == ("train/train", "val/val")


@pytest.fixture
def validation(monkeypatch):
    """A list of the classes of ten validation images."""
    listed = ["n03", "n01", "n02", "n01", "n02", "n03", "n01", "n02", "n03", "n03"]
    monkeypatch.setattr(tar_files, "validation_wnids", lambda: listed)
    return {f"ILSVRC2012_val_{i + 1:08}.JPEG": wnid for i, wnid in enumerate(listed)}


def test_imagenets_flat_val_is_labelled_by_the_list_of_tfds(tmp_path, validation, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("train", "n01 n02 n03"), "test/ILSVRC2012_test_00000001.JPEG")
    make_files(tmp_path / "val", *validation)
    assert folders_read(tmp_path) == ("train", "val")
    assert read(tmp_path, "test")[1] == validation
    assert [line for line in caplog.messages if "left out" in line] == []
    assert "not read: test/" in caplog.text


def test_imagenets_other_classes_are_left_out_with_a_line(tmp_path, validation, caplog):
    caplog.set_level("INFO", "convit_jax")
    make_files(tmp_path, *classes("train", "n01 n03"))
    make_files(tmp_path / "val", *validation, "notes.txt")
    expected = {name: wnid for name, wnid in validation.items() if wnid != "n02"}
    assert read(tmp_path, "test")[1] == expected
    line = f"{tmp_path}/val: left out: 3 images of the 1 classes that train/ lacks, 1 .txt"
    assert line in caplog.messages
    other = tmp_path / "other"
    make_files(other, *classes("train"))
    make_files(other / "val", *validation)
    assert "no image of the 2 classes, by ImageNet's list" in refusal(other, "test")


def test_imagenets_list_is_the_one_that_prepares_the_tfds_data_set(tmp_path):
    names = [f"val/ILSVRC2012_val_{i:08}.JPEG" for i in (1, 2, 50_000)]
    make_files(tmp_path, *names)  # no train/: the classes are all of ImageNet's
    source = open_source(f"folder:{tmp_path}", "test")
    assert source.num_classes == 1000
    # The first two and the last of ILSVRC2012_validation_ground_truth, as WordNet ids.
    wnids = [source.class_names[label] for label in source.labels]
    assert wnids == ["n01751748", "n09193705", "n02437616"]
    assert np.all(np.diff([int(name[1:]) for name in source.class_names]) > 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ILSVRC2012_val_00000011.JPEG", "expected a number of 1 to 10"),
        ("ILSVRC2012_val_00000002_n00000003.JPEG", "the name says class n00000003, .* n01"),
    ],
)
def test_wrong_names_of_validation_images_are_refused(tmp_path, validation, name, message):
    make_files(tmp_path, *classes("train", "n01 n02"), f"val/{name}")
    with pytest.raises(ValueError, match=message):
        open_source(f"folder:{tmp_path}", "test")


def test_tiny_imagenet_as_it_is_unzipped(tmp_path, caplog):
    caplog.set_level("INFO", "convit_jax")
    root = tmp_path / "tiny-imagenet-200"
    make_files(root, *(f"train/{c}/images/{c}_{i}.JPEG" for c in ("n1", "n2") for i in range(3)))
    make_files(root, "train/n1/n1_boxes.txt", "test/images/test_0.JPEG", "wnids.txt")
    make_files(root, *(f"val/images/val_{i}.JPEG" for i in range(4)))
    lines = ("val_0.JPEG\tn2\t0\t32\t44\t62\n", "val_1.JPEG\tn1\t5\t5\t9\t9\n", "gone.JPEG\tn1\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    assert set(read(tmp_path)[1].values()) == {"n1", "n2"}
    where, labels = read(tmp_path, "test")
    assert where == "tiny-imagenet-200/val/images"
    assert labels == {"val_0.JPEG": "n2", "val_1.JPEG": "n1"}
    (line,) = [text for text in caplog.messages if "val/images: left out" in text]
    assert "2 images without a line in" in line
    assert "1 line of " in line
    annotations = root / "val/val_annotations.txt"
    for text, message in (
        ("val_0.JPEG\tn7\n", r"classes that train/ lacks: \['n7'\]"),
        ("val_0.JPEG n1\n", "line 1: expected NAME<tab>CLASS"),
        ("val_0.JPEG\tn1\nval_0.JPEG\tn2\n", "line 2: val_0.JPEG is of class 'n2', above of 'n1'"),
        ("", "no image of the 2 classes"),
    ):
        annotations.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_source(f"folder:{tmp_path}", "test")
    annotations.unlink()
    assert "got test/, train/, val/; expected val/" in refusal(root, "test")


def test_a_flat_test_folder_is_no_split(tmp_path):
    make_files(tmp_path, *classes("train"), "test/1.jpg")
    text = refusal(tmp_path, "test")
    assert "expected val/ or validation/ or test/ for the test split" in text
    assert f"test/ has none. --config.data.source=folder:{tmp_path}/train holds out" in text
    assert len(read(tmp_path)[1]) == 6
    whole = tmp_path / "whole"
    make_files(whole, *classes("", "cat dog"), "test/1.jpg")
    assert "got test/ beside cat/, dog/. If test/ is a split, move it away" in refusal(whole)
    flat = tmp_path / "flat"
    make_files(flat, "train/1.jpg", "test/1.jpg")
    assert "got test/, train/ without class folders in them" in refusal(flat)
    coco = tmp_path / "coco"
    make_files(coco, "train2017/1.jpg", "val2017/1.jpg")
    assert "got train2017/, val2017/ without class folders in them" in refusal(coco)


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("train2017", "val2017"), "train_split=train2017 --config.data.test_split=val2017"),
        (("seg_test", "seg_train"), "train_split=seg_train --config.data.test_split=seg_test"),
        (("amazon", "webcam"), "train_split=amazon --config.data.test_split=webcam"),
    ],
)
def test_folders_that_hold_the_same_folders_are_no_classes(tmp_path, folders, hint):
    make_files(tmp_path, *(file for folder in folders for file in classes(folder)))
    text = refusal(tmp_path)
    assert f"--config.data.{hint}." in text
    assert f"{folders[0]}/ and {folders[1]}/ both hold cat/, dog/" in text
    assert f"--config.data.source=folder:{tmp_path}" in text
    # Each of the three ways out works.
    train, test = (word.split("=")[1] for word in hint.split())
    assert folders_read(tmp_path, train_split=train, test_split=test) == (train, test)
    assert set(read(tmp_path / train, val_fraction=0.5)[1].values()) == {"cat", "dog"}
    order = tmp_path / "order.txt"
    order.write_text("\n".join(folders))
    assert set(read(tmp_path, val_fraction=0.5, class_order=str(order))[1].values()) == {*folders}


def test_splits_with_few_shared_classes_are_known_by_their_names(tmp_path):
    make_files(tmp_path, *classes("train2017"), *classes("val2017", "cat"))
    assert "train2017/ with cat/, dog/ and val2017/ with " in refusal(tmp_path)
    deeper = tmp_path / "deeper"
    make_files(deeper, *classes("train/2017"), *classes("train/2018"), *classes("val"))
    assert "2017/ and 2018/ both hold" in refusal(deeper)


def test_classes_may_hold_folders(tmp_path):
    files = [f"{c}/{part}/{i}.jpg" for c in "abc" for part in ("images",) for i in range(20)]
    make_files(tmp_path, *files, *(f"{c}/{i}.jpg" for c in "de" for i in range(20)))
    make_files(tmp_path, *(f"{c}/{side}/{i}.jpg" for c in "de" for side in "lr" for i in range(5)))
    assert set(read(tmp_path)[1].values()) == {*"abcde"}


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    make_files(tmp_path, *classes("", "bus car train", 30))
    assert set(read(tmp_path)[1].values()) == {"bus", "car", "train"}
    pair = tmp_path / "pair"
    make_files(pair, *classes("", "invalid valid", 30))
    assert set(read(pair)[1].values()) == {"invalid", "valid"}
    listed = tmp_path / "listed"
    make_files(listed, *classes("", "control test", 30))
    assert "got test/ beside control/" in refusal(listed)
    (tmp_path / "order.txt").write_text("control\ntest\n")
    order = str(tmp_path / "order.txt")
    assert set(read(listed, class_order=order)[1].values()) == {"control", "test"}


def test_a_split_beside_class_folders_is_refused(tmp_path):
    make_files(tmp_path, *classes(""), *classes("test"))
    text = refusal(tmp_path)
    assert "got test/ beside cat/, dog/" in text
    assert "move the others into train/" in text


def test_two_folders_to_train_on_are_refused(tmp_path):
    make_files(tmp_path, *classes("train"), *classes("Training"), *classes("val"))
    assert "got Training/, train/; choose with --config.data.train_split=" in refusal(tmp_path)
    assert folders_read(tmp_path, train_split="train") == ("train", "val")


def test_named_splits_must_be_there_and_differ(tmp_path):
    make_files(tmp_path, *classes("fold1"), *classes("fold2"), "unlabelled/1.jpg")
    assert folders_read(tmp_path, train_split="fold2", test_split="fold1") == ("fold2", "fold1")
    text = refusal(tmp_path, train_split="fold3")
    assert text.startswith(f"data.train_split: no folder {tmp_path}/fold3; expected one of fold1/")
    assert "data.test_split: no folder" in refusal(tmp_path, train_split="fold1", test_split="x")
    same = {"train_split": "fold1", "test_split": "fold1"}
    with pytest.raises(ValueError, match=r"data\.test_split: expected another folder than"):
        open_source(f"folder:{tmp_path}", "test", **same)
    with pytest.raises(FileNotFoundError, match="for the test split"):
        read(tmp_path, "test", train_split="fold1", test_split="unlabelled")
