"""Weights and pictures in buckets: load, convert and predict read and write them there."""

import json
import re

import numpy as np
from PIL import Image
import pytest
from small_models import MODEL, equal, random_params, write_shards

from convit_jax import load, recipe, storage, to_torch
from convit_jax.analysis import images
from convit_jax.cli import convert, predict
from convit_jax.predict import files as predict_files
from convit_jax.train import init_from
from convit_jax.weights import safetensors
from convit_jax.weights.digest import digest
from convit_jax.weights.loaded import Loaded


def test_weights_are_converted_and_loaded_in_a_bucket(bucket, tmp_path):
    pytest.importorskip("torch")
    params = random_params()
    local = tmp_path / "local.safetensors"
    safetensors.save_weights(local, Loaded(MODEL, params, class_names=tuple("abcde")))
    source = str(local)
    for name in ("one.pth", "two.safetensors"):
        convert.main([source, f"{bucket}/{name}"])
        source = f"{bucket}/{name}"
        equal(load(source)[1]["params"], params)
    convert.main([source, str(tmp_path / "back.pth")])
    equal(load(tmp_path / "back.pth")[1]["params"], params)

    config = recipe.get_config()
    config.init_from = source
    start = init_from.settle_new_model(config)
    equal(start.params, params)
    assert config.model.embed_dim == MODEL.embed_dim

    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", to_torch(params))
    for path in (tmp_path / "shards").iterdir():
        storage.as_path(f"{bucket}/shards/{path.name}").write_bytes(path.read_bytes())
    equal(load(f"{bucket}/shards")[1]["params"], params)

    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nothing.pth"):
        load(f"{bucket}/nothing.pth")
    storage.write_text(f"{bucket}/bad.pth", "PK\x03\x04 no zip archive")
    with pytest.raises(ValueError, match=rf"{re.escape(bucket)}/bad.pth: not a readable PyTorch"):
        load(f"{bucket}/bad.pth")


def test_pictures_are_predicted_and_drawn_in_a_bucket(gcs, capsys):
    loaded = Loaded(MODEL, random_params())
    safetensors.save_weights(f"{gcs}/weights.safetensors", loaded)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        with storage.whole_file(f"{gcs}/photos/{name}") as path:
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    assert predict_files.find_images([f"{gcs}/photos/", "az://b/a.png", f"{gcs}/none/*.png"]) == (
        [f"{gcs}/photos/a.png", f"{gcs}/photos/b.png"],
        {
            "az://b/a.png": "expected a local path, gs://BUCKET/NAME or s3://BUCKET/NAME, got "
            "'az://b/a.png'",
            f"{gcs}/none/*.png": "no file matches this pattern",
        },
    )
    (name, pixels), _ = images.of_files(loaded, [f"{gcs}/photos/"])
    assert (name, pixels.shape) == (f"{gcs}/photos/a.png", (16, 16, 3))
    pictures = [f"{gcs}/photos/*.png", f"{gcs}/photos/none.png"]
    arguments = ["--weights", f"{gcs}/weights.safetensors", "--json", *pictures]
    assert predict.main([*arguments, "--attention", f"{gcs}/maps"]) == 1
    *lines, missing = map(json.loads, capsys.readouterr().out.splitlines())
    assert missing["file"] == pictures[1]
    assert [line["file"] for line in lines] == [f"{gcs}/photos/{name}.png" for name in "ab"]
    assert lines[0]["predictions"] != lines[1]["predictions"]
    assert lines[0]["weights"]["sha256"] == digest(loaded.params)
    assert storage.as_path(lines[1]["attention"]).read_bytes().startswith(b"\x89PNG")
