"""convit analyse: tables, JSON and pictures. tests/analysis/masking_test.py has masking."""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets
from small_models import DEIT, MODEL, random_params

from convit_jax.cli import analyse
from convit_jax.model import locality
from convit_jax.predict import Preprocess
from convit_jax.weights import safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

PHOTOS = [
    str(pathlib.Path(datasets.__file__).with_name("images") / name)
    for name in ("china.jpg", "flower.jpg")
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights: two GPSA layers and a plain one, 4 x 4 patches."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    # Positional weights of N(0, 1) are sharp, and the softmax of the others is not one-hot.
    params = jax.tree.map(lambda x: 0.5 * x, random_params())
    safetensors.save_weights(path, Loaded(MODEL, params, mean=(0.4,) * 3, std=(0.3,) * 3))
    return path


def test_gates_nonlocality_and_maps_are_those_of_the_functions(weights, tmp_path, capsys):
    loaded = read_weights(weights)
    out = [f"--weights={weights}", f"--out={tmp_path}"]
    analyse.main(["gates", *out])
    analyse.main(["nonlocality", *out, *PHOTOS])
    queries = ["--query=1,2", "--query=4,4"]
    analyse.main(["maps", *out, "--layers=3,1", *queries, *PHOTOS])
    printed = capsys.readouterr().out
    gates, nonlocality, maps = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("gates", "nonlocality", "maps")
    )
    variables, images = {"params": loaded.params}, Preprocess(loaded)(*PHOTOS)
    expected = locality.gates(loaded.params)
    np.testing.assert_allclose(gates["gates"], expected, rtol=1e-5)
    assert nonlocality["gates"] == gates["gates"]
    assert (nonlocality["images"], nonlocality["grid"]) == (2, [4, 4])
    apply = jax.jit(functools.partial(MODEL.apply, return_attention=True))
    _, whole = apply(variables, images)
    measured = locality.nonlocality(whole, (4, 4))
    for name, values in measured.items():
        np.testing.assert_allclose(nonlocality["nonlocality"][name], values, rtol=1e-5)
    plain = locality.over_patches(whole["blocks"]["content"], 16)
    seen = np.concatenate([plain, whole["gpsa_blocks"]["blended"][:1]])  # layers 3 and 1
    places = [(0, 1), (3, 3)]
    assert [(m["image"], m["query"]) for m in maps["maps"]] == [
        (photo, [row + 1, column + 1]) for photo in PHOTOS for row, column in places
    ]
    for number, of_query in enumerate(maps["maps"]):
        row, column = places[number % 2]
        expected = seen[:, number // 2, :, 4 * row + column].reshape(2, 4, 4, 4)
        np.testing.assert_allclose(of_query["attention"], expected, atol=2e-6)
    distance = np.hypot(*np.indices((4, 4)) - np.array([3, 3])[:, None, None])
    expected = (distance * expected).sum(axis=(-1, -2))
    np.testing.assert_allclose(maps["maps"][-1]["distance"], expected, rtol=1e-4)

    blended = measured["blended"].mean(axis=1)
    assert f"    3  plain  {blended[2]:.2f}" in printed
    assert "over 2 images and 4 x 4 patches" in printed
    assert "attention to all patches alike: 2.01" in printed
    for name in ("gates.png", "nonlocality.png", "1-china.jpg.1-2.png", "2-flower.jpg.4-4.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 112
    # The frame is around the patch in the lower right corner of the picture, the first panel.
    framed = np.asarray(Image.open(tmp_path / "2-flower.jpg.4-4.png").convert("RGB"))
    red = np.argwhere((framed[:112, :112] == (255, 0, 0)).all(axis=-1))
    assert red.min(axis=0).tolist() == [84, 84]
    assert red.max(axis=0).tolist() == [111, 111]


def test_a_data_set_and_mistakes(tmp_path, capsys, monkeypatch):
    """Test images are spread evenly. At another size, of a DeiT, which has no positional part."""
    path = tmp_path / "deit.safetensors"
    safetensors.save_weights(path, Loaded(DEIT, random_params(DEIT)))
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "data" / f"class{label}").mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"class{label}" / f"{i}.png")
    data = [f"--weights={path}", f"--config.data.source=folder:{tmp_path / 'data'}"]
    analyse.main(["maps", *data, "--size=8x12", "--count=3", f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "maps.json").read_text())
    assert [m["image"] for m in found["maps"]] == ["class0/0.png", "class1/1.png", "class2/3.png"]
    assert found["grid"] == [2, 3]
    assert found["layers"] == [1, 2]
    assert {tuple(m["query"]) for m in found["maps"]} == {(2, 2)}
    for arguments, message in (
        (["gates", data[0]], "expected a model with GPSA layers, got a DeiT"),
        (["nonlocality", *data, PHOTOS[0]], "expected images or a configuration with a data set"),
        (["nonlocality", data[0], "no.jpg"], "no.jpg"),
        (["nonlocality", data[0], str(path)], "deit.safetensors: "),
        (["maps", data[0], "--query=5,1", PHOTOS[0]], "query: expected a row of 1 to 4"),
        (["maps", data[0], "--layers=3", PHOTOS[0]], "layers: expected 1 to 2, got 3"),
        (
            ["maps", data[0], "--part=positional", PHOTOS[0]],
            "expected a model with GPSA layers, got a DeiT",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            analyse.main(arguments)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib: pip install 'convit-jax\[study\]'"):
        analyse.main(["nonlocality", data[0], f"--out={tmp_path / 'none'}", PHOTOS[0]])
    assert not (tmp_path / "none").exists()
    for arguments, message in (
        (["gates", *data], "unrecognized arguments: --config.data.source"),
        (["maps", data[0], "--query=5", PHOTOS[0]], "expected ROW,COLUMN such as 7,7, got 5"),
        (["masking"], "--weights"),
    ):
        with pytest.raises(SystemExit) as ended:
            analyse.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
