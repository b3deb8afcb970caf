"""Reports of evaluations: tables, accuracy by class, confusions, predictions."""

import json

import numpy as np
import pytest

from convit_jax.data.arrays import ArraySource
from convit_jax.data.class_mapping import ClassMapping
from convit_jax.train import eval_report

PETS = ClassMapping((2, 0, -1), ("cat", "dog", "eel"), 4, "by name")


def results_of(labels, predictions, **more):
    """Per-image results whose best classes are `predictions`."""
    labels, predictions = np.array(labels), np.array(predictions)
    best = np.stack([predictions, 1 - predictions], axis=-1)
    arrays = {
        "evaluated": np.ones(len(labels), bool),
        "label": labels,
        "rank": np.where(labels == predictions, 1, 2),
        "predictions": best,
        "probabilities": np.full(best.shape, [0.75, 0.25]),
        **more,
    }
    return eval_report.of_evaluated(arrays)


def test_accuracy_and_confusions_by_class():
    per_image = results_of([0, 0, 0, 1], [0, 1, 0, 1])
    cat, dog = eval_report.by_class(per_image, PETS)
    assert cat == {"class": "cat", "images": 3, "top1": 2 / 3, "top5": 1.0}
    assert dog == {"class": "dog", "images": 1, "top1": 1.0, "top5": 1.0}
    assert eval_report.confusion(per_image, PETS) == {"confusion": [[2, 1], [0, 1]]}
    cat, dog = eval_report.by_class(results_of([1], [1]), PETS)
    assert (cat["images"], cat["top1"], cat["top5"]) == (0, None, None)


def test_many_classes_get_their_most_frequent_confusions():
    names = tuple(f"class {i}" for i in range(300))
    classes = ClassMapping(tuple(range(300)), names, 300, "by name")
    labels = [5, 5, 5, 7, *range(300)]
    predictions = [6, 6, 5, 8, *[(i + 1) % 300 for i in range(300)]]
    (found,) = eval_report.confusion(results_of(labels, predictions), classes).values()
    assert len(found) == 100
    assert found[0] == {"class": "class 5", "predicted": "class 6", "images": 3}
    assert found[1] == {"class": "class 7", "predicted": "class 8", "images": 2}
    assert {mistake["images"] for mistake in found[2:]} == {1}


def test_a_line_of_predictions_has_file_label_names_and_probabilities():
    evaluated = np.array([True, False, True])  # the second image is corrupt
    per_image = results_of([0, -1, 1], [0, -1, 0], evaluated=evaluated)
    names = {0: "a/1.jpg", 2: "b/1.jpg"}
    first, second = eval_report.predictions((8, 12), per_image, names, PETS)
    assert first == {
        "image_size": [8, 12], "index": 0, "file": "a/1.jpg", "label": 2, "label_name": "cat",
        "top5": [2, 0], "top5_names": ["cat", "dog"], "probabilities": [0.75, 0.25],
    }  # fmt: skip
    assert (second["index"], second["file"], second["label_name"]) == (2, "b/1.jpg", "dog")


def test_names_of_images_are_found_with_and_without_a_list_of_them():
    file_names = np.array([b"%d.png" % i for i in range(9)])
    source = ArraySource(np.zeros((9, 2, 2, 1), np.uint8), np.zeros(9, int), ("a",), file_names)
    names = eval_report.image_names(source, [3, 7], None)

    class Unlisted:
        def __getitem__(self, index):
            return source[index]

        def names_and_labels(self, cache_dir=None):
            raise ValueError("no file names")

    assert names == {3: "3.png", 7: "7.png"}
    assert eval_report.image_names(Unlisted(), [3, 7], None) == names


def result(size, **more):
    return {"image_size": size, "top1": 0.5, "top5": 1.0, "loss": 0.25, "images": 4,
            "images_per_second": 10.0, **more}  # fmt: skip


def test_tables_show_every_size_and_up_to_twenty_classes():
    by_class = eval_report.by_class(results_of([0, 0, 0, 1], [0, 1, 0, 1]), PETS)
    results = [result([8, 8], by_class=by_class), result([16, 16], by_class=by_class)]
    text = eval_report.tables(results, PETS)
    assert text == (
        "  image    top-1     top-5    loss  images  images/s\n"
        "  8 x 8  50.000%  100.000%  0.2500       4      10.0\n"
        "16 x 16  50.000%  100.000%  0.2500       4      10.0\n"
        "over the 2 classes of the data; the weights' other 2 are left out\n"
        "\n"
        "images  top-1 8 x 8  top-1 16 x 16  class\n"
        "     3      66.667%        66.667%  cat\n"
        "     1     100.000%       100.000%  dog"
    )
    many = ClassMapping(tuple(range(21)), tuple("abcdefghijklmnopqrstu"), 21, "by name")
    assert len(eval_report.tables(results, many).splitlines()) == 3


@pytest.mark.parametrize("name", ["a", "b [c]", 'd { "e" ]', "f\n["])
def test_matrices_are_written_a_row_a_line(name):
    content = {"weights": name, "confusion": [[1, 2], [3, 4]], "by_class": [{name: 0.5}], "x": []}
    text = eval_report.to_json(content)
    assert json.loads(text) == content
    assert "    [1, 2],\n    [3, 4]\n" in text
