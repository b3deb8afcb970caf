"""What an evaluation reads: which images, which logits, and models that fit each size."""

import logging

import numpy as np
from PIL import Image
import pytest
from small_models import random_params

from convit_jax import ConViT, recipe
from convit_jax.data.class_names import imagenet
from convit_jax.train import eval_run, eval_setup
from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded

SMALL = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2,
         "local_up_to_layer": 1}  # fmt: skip


@pytest.fixture
def setting(tmp_path, caplog):
    """Returns a function that prepares an evaluation of weights on class folders."""
    caplog.set_level(logging.INFO, "convit_jax")

    def prepare(folders, num_classes, class_names=None, sizes=(), **options):
        for folder in folders:
            (tmp_path / "images" / folder).mkdir(parents=True)
            for number in range(3):
                image = Image.new("RGB", (32, 32), (len(folder), number, 0))
                image.save(tmp_path / "images" / folder / f"{number}.png")
        model = ConViT(num_classes=num_classes, **SMALL)
        path = tmp_path / "weights.safetensors"
        loaded = Loaded(model, random_params(model), class_names=class_names)
        safetensors.save_weights(path, loaded)
        config = recipe.get_config()
        config.model.update(**{**SMALL, **options})
        config.init_from = str(path)
        config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
        return eval_setup.prepare(config, None, eval_setup.Choices(sizes=sizes))

    return prepare


def test_folders_named_by_numbers_are_these_logits(setting, caplog):
    prepared = setting([str(i) for i in range(12)], 12)
    assert prepared.source.class_names[:3] == ("0", "1", "10")
    assert prepared.classes.logits[:3] == (0, 1, 10)
    assert "classes: found by number, counted from 0" in caplog.text


def test_folders_without_a_split_are_evaluated_whole(setting):
    prepared = setting(["a", "b"], 2)
    assert len(prepared.source) == 6
    assert prepared.source.description.endswith(", all images")


def test_the_order_of_names_is_said_where_the_weights_have_none(setting, caplog):
    setting(["b", "a", "c"], 3)
    assert "by place, since the weights do not name theirs: 'a', 'b', 'c' are taken" in caplog.text


def test_some_of_imagenets_classes_are_evaluated_over_their_logits(setting, capsys):
    ids = list(imagenet())
    prepared = setting([ids[900], ids[3]], 1000)
    assert prepared.classes.logits == (3, 900)
    report = eval_run.run(prepared)
    assert report["classes"] == "2 of the weights' 1,000, by name"
    (result,) = report["results"]
    assert [c["class"] for c in result["by_class"]] == ["tiger shark", "water tower"]
    assert result["top5"] == 1.0  # of two classes
    assert np.sum(result["confusion"]) == result["images"] == 6
    out = capsys.readouterr().out
    assert "over the 2 classes of the data; the weights' other 998 are left out\n" in out
    assert out.splitlines()[-1].split()[-2:] == ["water", "tower"]


def test_attention_is_chosen_for_each_size(setting):
    small, large = setting(["a", "b"], 2, sizes=((32, 32), (1024, 1024))).models
    assert (small.attention, large.attention) == ("xla", "chunked")
    assert large.image_shape == (1024, 1024, 3)


def test_attention_that_was_chosen_by_the_configuration_stays(setting):
    (large,) = setting(["a", "b"], 2, sizes=((1024, 1024),), attention="xla").models
    assert large.attention == "xla"
