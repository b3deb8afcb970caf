"""What is published: timm builds the same model from it, and the card tells what was measured."""

import logging

import jax
import numpy as np
import pytest
import reference
from small_models import DEIT, MODEL, equal, random_params

from convit_jax.weights import publish
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

MODELS = {
    "convit": MODEL.clone(
        in_channels=1, use_pos_embed=False, mlp_ratio=2.0, num_heads=2, global_pool="avg"
    ),
    "deit": DEIT.clone(num_heads=2, image_size=(16, 24), global_pool="avg"),
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_builds_the_same_model(tmp_path, name):
    timm, torch = reference.import_timm()
    model = MODELS[name]
    numbers = ((0.5,) * model.in_channels, (0.25,) * model.in_channels, 0.9)
    loaded = Loaded(model, random_params(model), "", tuple("abcde"), *numbers)
    publish.write_repository(tmp_path, f"mine/{name}", loaded)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = np.random.default_rng(0).standard_normal((2, *model.image_shape), np.float32)
    with torch.inference_mode():
        there = theirs(reference.timm_images(images, torch)).numpy()
    here = jax.jit(model.apply)({"params": loaded.params}, images)
    np.testing.assert_allclose(here, there, atol=2e-5 * np.abs(there).max())
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (model.in_channels, *model.image_shape[:2])
    found = (tuple(config["mean"]), tuple(config["std"]), config["crop_pct"])
    assert found == numbers
    assert theirs.pretrained_cfg["label_names"] == list("abcde")
    again = read_weights(tmp_path)
    equal(again.params, loaded.params)
    assert (again.model, again.class_names, again.mean) == (model, loaded.class_names, loaded.mean)


def test_the_card_and_what_timm_cannot_read(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="convit_jax")
    metrics = {"images": 360, "loss": 0.1251, "top1": 0.99167, "top5": 1.0}
    loaded = Loaded(MODEL, random_params(), class_names=tuple("abcde"), metrics=metrics, step=1683)
    publish.write_repository(tmp_path, "mine/small", loaded)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n")
    assert "# small\n\nConViT of 3 layers of width 16 with 4 heads, 0.0 million" in card
    assert "| held-out images | top-1 | top-5 | loss |" in card
    assert "| 360 | 99.17% | 100.00% | 0.1251 |" in card
    assert "of these weights (step 1683)" in card
    assert 'timm.create_model("hf-hub:mine/small", pretrained=True)' in card
    assert caplog.text == ""

    wide = MODEL.clone(image_size=(16, 24))
    publish.write_repository(tmp_path, "mine/wide", Loaded(wide, random_params(wide)))
    assert "timm cannot read it: timm's ConViT takes square images" in caplog.text
    assert "timm" not in (tmp_path / "README.md").read_text()
    assert "These weights have not been evaluated" in (tmp_path / "README.md").read_text()
    assert "architecture" not in (tmp_path / "config.json").read_text()
    assert read_weights(tmp_path).model == wide
