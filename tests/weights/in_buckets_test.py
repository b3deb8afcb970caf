"""Weights and pictures in buckets: load, convert and predict read and write them there."""

import json

import numpy as np
from PIL import Image
import pytest
from small_models import MODEL, equal, random_params, write_shards

from convit_jax import load, storage, to_torch
from convit_jax.cli import convert, predict
from convit_jax.weights import safetensors, stablehlo
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded


def test_every_format_is_converted_loaded_and_used_in_a_bucket(bucket, tmp_path, capsys):
    pytest.importorskip("torch")
    # Brackets in the name of the folder would be a pattern.
    folder = bucket.replace("[", "-").replace("]", "")
    params, names = random_params(), tuple("abcde")
    local = tmp_path / "local.safetensors"
    safetensors.save_weights(local, Loaded(MODEL, params, class_names=names))
    source = str(local)
    for name in ("one.safetensors", "two.pth", "three.safetensors"):
        convert.main([source, f"{folder}/{name}"])
        source = f"{folder}/{name}"
        model, variables = load(source)
        assert model.num_classes == 5
        equal(variables["params"], params)
    convert.main([f"{folder}/one.safetensors", str(tmp_path / "back.safetensors")])
    assert (tmp_path / "back.safetensors").read_bytes() == local.read_bytes()
    convert.main([source, f"{folder}/four.stablehlo", "--batch=1"])
    exported = stablehlo.read_exported(f"{folder}/four.stablehlo")
    assert exported.about["class_names"] is None

    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", to_torch(params))
    for path in (tmp_path / "shards").iterdir():
        (storage.as_path(folder) / "repository" / path.name).write_bytes(path.read_bytes())
    equal(read_weights(f"{folder}/repository").params, params)

    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / name)
        storage.as_path(f"{folder}/photos/{name}").write_bytes((tmp_path / name).read_bytes())
    common = ["--weights", f"{folder}/one.safetensors", "--json"]
    pictures = [f"{folder}/photos/*.png", f"{folder}/photos/none.png"]
    assert predict.main([*common, *pictures, "--attention", f"{folder}/maps"]) == 1
    *lines, missing = map(json.loads, capsys.readouterr().out.splitlines())
    assert missing["file"] == pictures[1]
    assert [line["file"] for line in lines] == [f"{folder}/photos/{n}.png" for n in "ab"]
    assert storage.as_path(lines[1]["attention"]).read_bytes().startswith(b"\x89PNG")
    assert predict.main([*common, str(tmp_path / "b.png")]) == 0
    there = json.loads(capsys.readouterr().out)
    assert there["predictions"] == lines[1]["predictions"]

    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nothing.pth"):
        load(f"{folder}/nothing.pth")
    storage.write_text(f"{folder}/bad.pth", "PK\x03\x04 no zip archive")
    with pytest.raises(ValueError, match=rf"{folder}/bad.pth: not a readable PyTorch file"):
        load(f"{folder}/bad.pth")
