"""Fine-tuning with configs/finetune.py: PyTorch's weights, other images, another size."""

import json

import jax
import numpy as np
from PIL import Image
import pytest
import reference
import runs
from small_models import random_params

from configs import finetune
from convit_jax import ConViT
from convit_jax.data.open import open_source
from convit_jax.parallel import signals
from convit_jax.train import loop, setup
from convit_jax.weights import safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

EPOCHS = 6.0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """timm's ConViT of two blocks for 1,000 classes at 224 pixels, as a .pth file."""
    _, torch = reference.import_timm()
    from timm.models.convit import ConVit

    model = ConVit(embed_dim=8, num_heads=4, depth=2, local_up_to_layer=1)
    path = tmp_path_factory.mktemp("weights") / "pretrained.pth"
    torch.save({"model": model.state_dict(), "epoch": 299}, path)
    return path


@pytest.fixture(scope="module")
def zeros_and_ones(tmp_path_factory):
    """Class folders, without a validation part, of two of scikit-learn's digits as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    digits = open_source("digits", "train")
    for name in ("0", "1"):
        (folder / name).mkdir()
    for i in np.flatnonzero(digits.labels < 2)[:144]:
        picture = Image.fromarray(digits.images[i, ..., 0]).resize((40, 40))
        picture.save(folder / str(digits.labels[i]) / f"{i}.png")
    return folder


def make_config(pretrained, folder):
    config = finetune.get_config()
    config.init_from = str(pretrained)
    config.data.update(source=f"folder:{folder}", workers=0)
    config.model.update(image_size=32, depth=2, embed_dim=32, local_up_to_layer=1)
    config.train.update(epochs=EPOCHS, batch_size=32, eval_every=3.0, log_every=1)
    # Random weights must learn in 24 steps: no regularisation, and a high learning rate.
    config.augment.update(crop="none", flip=0.0, randaugment_ops=0, color_jitter=0.0)
    config.mixup.erase_prob = 0.0
    config.train.label_smoothing = 0.0
    config.optim.lr = 5e-2
    return config


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_the_loss_falls_and_a_stopped_run_goes_on(
    pretrained, zeros_and_ones, tmp_path, monkeypatch
):
    config = make_config(pretrained, zeros_and_ones)
    prepared = setup.prepare(config, Workdir(tmp_path / "whole"))
    assert prepared.program.model.num_classes == 2
    before = read_weights(pretrained).params
    assert before["pos_embed"].shape == (1, 196, 32)
    assert prepared.init_params["pos_embed"].shape == (1, 4, 32)
    for name in ("gpsa_blocks", "last_block"):
        jax.tree.map(np.testing.assert_array_equal, prepared.init_params[name], before[name])
    result = loop.train(prepared)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 24
    assert np.mean(whole[:3]) > 0.6  # log(2) is 0.69
    assert np.mean(whole[-3:]) < 0.45
    assert result["images"] == 12
    assert result["top1"] > 0.9

    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Interruption, "requested", lambda self: next(calls) == 6)
        assert loop.train(setup.prepare(config, Workdir(tmp_path / "cut"))) is None
    assert 1 < runs.steps_saved(tmp_path / "cut")[-1] < 12
    # The run is evaluated, not the weights that it started from, which may be gone.
    config.init_from = str(pretrained)
    resumed = setup.prepare(config, Workdir(tmp_path / "cut"))
    assert resumed.init_params is None
    assert loop.train(resumed) == result
    assert losses(tmp_path / "cut") == whole
    names = read_weights(tmp_path / "cut").class_names
    assert names == ("0", "1")
    ends = [
        read_weights(tmp_path / name / "weights.safetensors").params for name in ("cut", "whole")
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_head_that_is_kept_for_other_classes_is_warned_of(tmp_path, caplog):
    runs.write_images(tmp_path / "images", per_class=8)
    small = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2,
             "local_up_to_layer": 1}  # fmt: skip
    model = ConViT(num_classes=3, **small)
    config = finetune.get_config()
    config.init_from = str(tmp_path / "three.safetensors")
    config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
    config.model.update(small)
    config.train.batch_size = 8
    for order, new_head, warned in (("012", False, 0), ("021", True, 0), ("021", False, 1)):
        names = tuple(f"class{digit}" for digit in order)
        loaded = Loaded(model, random_params(model), class_names=names)
        safetensors.save_weights(config.init_from, loaded)
        config.init_new_head = new_head
        caplog.clear()
        setup.prepare(config, Workdir(tmp_path / "run"))
        said = "is kept, but its classes are not those of folder:"
        assert caplog.text.count(said) == warned, (order, new_head)
