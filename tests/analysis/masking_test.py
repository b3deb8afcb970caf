"""Masked parameters, and the table of them: PyTorch with edited gates and position embedding."""

import copy
import json

import numpy as np
from PIL import Image
import pytest
import reference

from convit_jax.analysis import masking
from convit_jax.cli import analyse
from convit_jax.data.images import transforms
from convit_jax.model.normalise import normalise
from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)


def edited(theirs, masked, layers, torch):
    """Returns timm's model with its position embedding at 0, or its first gates open or shut."""
    theirs = copy.deepcopy(theirs)
    with torch.no_grad():
        if masked == "position embedding":
            theirs.pos_embed.zero_()
        for block in theirs.blocks[: layers or 0]:
            block.attn.gating_param.fill_(torch.inf if masked == "content" else -torch.inf)
    return theirs


def test_the_table_is_that_of_pytorch_with_edited_gates(tmp_path, capsys):
    """On random weights, whose file states a normalisation that is not the recipe's."""
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair("convit")
    weights, out = tmp_path / "random.safetensors", tmp_path / "out"
    safetensors.save_weights(weights, Loaded(model, variables["params"], mean=MEAN, std=STD))
    rng, images = np.random.default_rng(0), []
    transform = transforms.EvalTransform((12, 20), 0.875, False)
    for label in range(5):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{i}.png")
            images.append(transform(pixels))
    analyse.main(
        ["masking", f"--weights={weights}", f"--config.data.source=folder:{tmp_path / 'data'}",
         "--config.data.workers=1", "--first=1,2", f"--out={out}"]
    )  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((out / "masking.json").read_text())
    rows = [(row["masked"], row["layers"]) for row in found["results"]]
    assert rows == [
        ("nothing", None), ("position embedding", None), ("content", 1), ("content", 2),
        ("position", 1), ("position", 2),
    ]  # fmt: skip
    inputs = reference.timm_images(np.asarray(normalise(np.stack(images), MEAN, STD)), torch)
    labels, losses = torch.arange(5).repeat_interleave(4), set()
    for row, line in zip(found["results"], printed[1:], strict=False):
        with torch.inference_mode():
            logits = edited(theirs, row["masked"], row["layers"], torch)(inputs)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert row["top1"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        assert row["images"] == 20
        assert f"{row['loss']:.4f}" in line
        losses.add(round(row["loss"], 4))
    assert len(losses) == len(rows)  # every masking matters
    assert (out / "masking.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_masked_is_refused():
    params = {"gpsa_blocks": {"attn": {"gate": np.ones((2, 4), np.float32)}}}
    assert masking.without_content(params, 1)["gpsa_blocks"]["attn"]["gate"].tolist() == [
        [1e3] * 4, [1.0] * 4,
    ]  # fmt: skip
    for function in (masking.without_content, masking.without_position):
        with pytest.raises(ValueError, match="expected 1 to the 2 GPSA layers, got 3"):
            function(params, 3)
        with pytest.raises(ValueError, match="expected 1 to the 0 GPSA layers, got 1"):
            function({}, 1)
    with pytest.raises(ValueError, match="expected weights with one"):
        masking.without_position_embedding(params)
