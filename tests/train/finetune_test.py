"""Fine-tuning with configs/finetune.py: PyTorch's weights, other images, another size."""

import itertools
import json
import logging

import jax
import numpy as np
from PIL import Image
import pytest
import reference
import runs
from safetensors import numpy
from small_models import random_params

from configs import finetune
from convit_jax import ConViT, create_model
from convit_jax.data.open import open_source
from convit_jax.model.normalise import IMAGENET_MEAN, of_channels
from convit_jax.model.variants import options_of_kind
from convit_jax.parallel import signals
from convit_jax.predict import Predictor
from convit_jax.train import eval_setup, loop, same_run, setup
from convit_jax.weights import safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

EPOCHS = 6.0
SMALL = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2,
         "local_up_to_layer": 1}  # fmt: skip


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
    config.optim.update(lr=3e-3, layer_decay=1.0, freeze="gates", freeze_epochs=2.0)
    config.model.in_channels = 1
    return config


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def gates(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["gates"][0] for line in lines if line["kind"] == "train"]


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
    kernel = before["patch_embed"]["kernel"].sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(prepared.init_params["patch_embed"]["kernel"], kernel)
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
    means = gates(tmp_path / "cut")  # after each step
    assert means[:8] == [means[0]] * 8  # frozen for two epochs of four steps
    assert all(a != b for a, b in itertools.pairwise(means[7:13]))


def test_a_model_of_one_channel_reads_folders_in_grey(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convit_jax")
    runs.write_images(tmp_path / "images", per_class=8)
    config = finetune.get_config()
    config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
    config.train.batch_size = 8
    config.init_from = str(tmp_path / "weights.safetensors")
    for channels in (3, 1):  # RGB weights, which are adapted; weights of one channel
        model = ConViT(**SMALL, num_classes=3, in_channels=channels)
        loaded = Loaded(model, random_params(model), mean=of_channels(IMAGENET_MEAN, channels))
        safetensors.save_weights(config.init_from, loaded)
        wanted = config.copy_and_resolve_references()
        wanted.model.in_channels = 1 if channels == 3 else None
        prepared = setup.prepare(wanted, Workdir(tmp_path / str(channels)))
        assert prepared.program.model.in_channels == 1
        assert prepared.config.data.mean == pytest.approx((0.449,))
        assert prepared.train_chunks[0]["image"].shape == (8, 32, 32, 1)
        (evaluated,) = prepared.test_chunks[0]["image"][:1]
        file = tmp_path / "images" / "val" / "class0" / "0.png"
        # As prediction makes it.
        predictor = Predictor(read_weights(config.init_from, in_channels=1), 1)
        np.testing.assert_array_equal(evaluated, predictor.pixels(file.read_bytes()))
    assert "data.mean=(0.449,): the recipe's for RGB, averaged for one channel" in caplog.text
    assert "data.mean=(0.449,), but " not in caplog.text
    evaluation = eval_setup.prepare(wanted, None, eval_setup.Choices())
    assert evaluation.models[0].in_channels == 1


def test_a_head_that_is_kept_for_other_classes_is_warned_of(tmp_path, caplog):
    runs.write_images(tmp_path / "images", per_class=8)
    model = ConViT(num_classes=3, **SMALL)
    config = finetune.get_config()
    config.init_from = str(tmp_path / "three.safetensors")
    config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
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


def test_the_weights_decide_the_model_that_the_configuration_leaves_open(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convit_jax")
    runs.write_images(tmp_path / "images", per_class=8)
    config = finetune.get_config()
    config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
    config.train.batch_size = 8
    own = ConViT(**SMALL, num_classes=3, global_pool="avg")
    # A DeiT whose heads no shape tells, in a file that does not state them; and a paper's model.
    deit = ConViT(**SMALL | {"local_up_to_layer": 0}, cls_pos_embed=True, qkv_bias=True)
    tiny = create_model("convit_tiny", image_size=64, num_classes=3)
    for name, model, bare in (("own", own, 0), ("deit", deit, 1), ("tiny", tiny, 0)):
        loaded = Loaded(model, random_params(model))
        path = tmp_path / f"{name}.safetensors"
        safetensors.save_weights(path, loaded)
        if bare:
            numpy.save_file(numpy.load_file(path), path)
        wanted = config.copy_and_resolve_references()
        wanted.init_from = str(path)
        if bare:
            with pytest.raises(ValueError, match="give num_heads=N"):
                setup.prepare(wanted, Workdir(tmp_path / "bare"))
            wanted.model.num_heads = 2
        wanted.model.gate_init = 0.0
        caplog.clear()
        prepared = setup.prepare(wanted, Workdir(tmp_path / f"run of {name}"))
        made, chosen = prepared.program.model, prepared.config.model
        keys = options_of_kind("structure", "function")
        assert [getattr(made, k) for k in keys] == [getattr(model, k) for k in keys]
        assert (made.image_size, made.num_classes) == (model.image_size, 3)
        assert (chosen.name, chosen.depth) == (
            ("convit_tiny", None) if name == "tiny" else (None, 2)
        )
        assert caplog.text.count(f"taken from {path}: ") == 1
        assert "model.gate_init=0.0 changes nothing: it is an option of random" in caplog.text
        jax.tree.map(
            np.testing.assert_array_equal,
            prepared.init_params["last_block"], loaded.params["last_block"],
        )  # fmt: skip
    assert f"taken from {path}: model.image_size=64, model.name=convit_tiny" in caplog.text
    # A run that has started keeps its model, and does not read the weights again.
    same_run.record_start(prepared.workdir, prepared.config, prepared.data, 0)
    (prepared.workdir.checkpoints / "1").mkdir(parents=True)
    path.unlink()
    resumed = setup.prepare(wanted, prepared.workdir)
    assert (resumed.program.model, resumed.init_params) == (made, None)


def test_a_model_that_contradicts_the_weights_is_refused(tmp_path):
    runs.write_images(tmp_path / "images", per_class=8)
    own = ConViT(**SMALL, num_classes=3)
    tiny = create_model("convit_tiny", image_size=32, num_classes=3)
    for model, chosen, expected in (
        (own, {"name": "convit_tiny"}, "leave .* and the weights decide\n.*"
         "model.embed_dim: the configuration says 192 .by model.name=convit_tiny., the weights 16"),
        (tiny, {"name": "convit_small"}, "or set model.name=convit_tiny\n.*model.num_heads: the "
         "configuration says 9 .by model.name=convit_small., the weights 4"),
        (tiny, {"depth": 11}, "model.depth: the configuration says 11, the weights 12"),
    ):  # fmt: skip
        config = finetune.get_config()
        config.init_from = str(tmp_path / "weights.safetensors")
        safetensors.save_weights(config.init_from, Loaded(model, random_params(model)))
        config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
        config.model.update(chosen)
        with pytest.raises(ValueError, match=f"(?s){expected}"):
            setup.prepare(config, Workdir(tmp_path / "run"))
