"""Weights are loaded, with their model, from every kind of file; and our own export."""

import argparse
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from safetensors.numpy import load_file, save_file
from small_models import DEIT, MODEL, SMALL, equal, random_params

from configs import digits
import convit_jax
from convit_jax import ConViT, create_model, saved_config, to_torch
from convit_jax.model import variants
from convit_jax.weights import infer, safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir import record
from convit_jax.workdir.checkpoints import Checkpoints
from convit_jax.workdir.folder import Workdir


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="convit_jax")
    return caplog


@pytest.fixture
def plain(tmp_path):
    """Returns a function that writes a state dict as others do, without metadata."""

    def write(model, name="plain.safetensors"):
        save_file(to_torch(random_params(model)), tmp_path / name)
        return tmp_path / name

    return write


def test_our_export_keeps_all_there_is(tmp_path):
    model = ConViT(**SMALL, depth=3, local_up_to_layer=2, drop_path=0.1, qk_scale=0.3)
    model = model.clone(image_size=(16, 32), global_pool="avg", num_heads=2, mlp_ratio=2.7)
    names = ("ant", "bee", "crow", "dog", "élan")
    written = Loaded(model, random_params(model), "", names, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 0.9)
    path = tmp_path / "weights.safetensors"
    safetensors.save_weights(path, written)
    read = read_weights(path)
    equal(read.params, written.params)
    for field in ("model", "class_names", "mean", "std", "crop_pct"):
        assert getattr(read, field) == getattr(written, field)
    assert read.source == str(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    other, variables = convit_jax.load(path, num_classes=3, image_size=16, drop_path=0.0)
    assert (other.num_classes, other.image_size, other.drop_path) == (3, 16, 0.0)
    assert variables["params"]["pos_embed"].shape == (1, 16, 16)
    assert read_weights(path, num_classes=3).class_names is None
    grey = read_weights(path, in_channels=1)
    assert (len(grey.mean), len(grey.std)) == (1, 1)
    np.testing.assert_allclose((*grey.mean, *grey.std), (0.4, 0.2))
    assert read_weights(path, in_channels=4).mean == (0.5, 0.4, 0.3, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 5, "local_up_to_layer": 1, "num_heads": 2},
        {"num_classes": 0, "patch_size": (2, 4), "image_size": (16, 32), "in_channels": 1},
        {"use_pos_embed": False, "qkv_bias": True, "image_size": 56},
        {"mlp_ratio": np.nextafter(15 / 11, 2), "embed_dim": 11, "num_heads": 1},
    ],
)
def test_options_are_seen_in_the_weights(plain, options, log):
    model = MODEL.clone(**options)
    loaded, variables = convit_jax.load(plain(model))
    assert loaded == model
    equal(variables["params"], random_params(model))
    for key in ("depth", "num_heads", "patch_size", "local_up_to_layer", "qkv_bias"):
        assert f"{key}={getattr(model, key)}" in log.text


@pytest.mark.parametrize("name", ["convit_small_plus", "deit_tiny", "deit_small", "deit_base_plus"])
def test_the_papers_models_are_recognised(plain, name, log):
    model = create_model(name, num_classes=2)
    if name.startswith("convit"):
        model = model.clone(patch_size=32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes["params"])
    assert infer.model_of(params) == model
    assert variants.variant_of(create_model(name, image_size=96)) == name
    assert variants.variant_of(model.clone(depth=11)) is None


def test_what_shapes_do_not_tell_is_asked_for(plain):
    path = plain(DEIT)
    with pytest.raises(ValueError, match=r"num_heads: no shape tells .* a width of 16") as error:
        convit_jax.load(path)
    assert "deit_tiny 192" in str(error.value)
    assert convit_jax.load(path, num_heads=4)[0] == DEIT

    wide = plain(MODEL.clone(image_size=(8, 24)))
    with pytest.raises(ValueError, match="the 12 position embeddings form no square"):
        convit_jax.load(wide)
    with pytest.raises(ValueError, match="the 12 position embeddings form no square"):
        convit_jax.load(wide, image_size=(32, 24))
    assert convit_jax.load(wide, image_size=(8, 24))[0].grid == (2, 6)
    assert convit_jax.load(wide, image_size=(24, 8))[0].grid == (6, 2)


def test_contradictions_are_named(plain, tmp_path):
    path = plain(MODEL)
    with pytest.raises(ValueError, match="the weights contradict what is stated") as error:
        convit_jax.load(path, "convit_small", patch_size=4)
    assert str(error.value).splitlines()[1:] == [
        "  embed_dim: variant='convit_small': 432; the weights: 16",
        "  depth: variant='convit_small': 12; the weights: 3",
        "  num_heads: variant='convit_small': 9; the weights: 4",
        "  local_up_to_layer: variant='convit_small': 10; the weights: 2",
    ]
    with pytest.raises(ValueError, match="depth: the options given: 4; the weights: 3"):
        convit_jax.load(path, depth=4)
    fits = {"embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "patch_size": 4}
    assert convit_jax.load(path, "convit_small", **fits)[0] == MODEL
    with pytest.raises(ValueError, match=r"variant: expected one of convit_tiny, .*, got 'tiny'"):
        convit_jax.load(path, "tiny")
    with pytest.raises(ValueError, match=r"options: expected options of ConViT, .* got heads"):
        convit_jax.load(path, heads=4)

    export = tmp_path / "export.safetensors"
    safetensors.save_weights(export, Loaded(DEIT, random_params(DEIT)))
    with pytest.raises(ValueError, match="num_heads: the options given: 2; the weights: 4"):
        convit_jax.load(export, num_heads=2)
    lies = {"class_names": None, "mean": [0.5], "std": [0.5], "crop_pct": 1}
    lies["options"] = {"depth": 9}
    save_file(to_torch(random_params()), export, {"convit_jax": json.dumps(lies)})
    with pytest.raises(ValueError, match="depth: its metadata: 9; the weights: 3"):
        convit_jax.load(export)
    save_file(to_torch(random_params()), export, {"convit_jax": "{}"})
    with pytest.raises(ValueError, match=r"the metadata 'convit_jax' cannot be read: KeyError"):
        convit_jax.load(export)


def test_an_upstream_training_checkpoint(tmp_path, log):
    _, torch = reference.import_timm()
    tensors = {}
    for seed in (0, 1):
        state_dict = to_torch(random_params(seed=seed))
        tensors[seed] = {k: torch.from_numpy(v) for k, v in state_dict.items()}
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors[0].items()}
    wrapped["module.blocks.0.attn.rel_indices"] = torch.zeros(1, 16, 16, 3)
    content = {
        "model": wrapped,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [0.1], "step": 3},
        "epoch": 3,
        "model_ema": tensors[1],
        "args": argparse.Namespace(lr=0.1, model="convit_tiny", output_dir="", data=["x"]),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    equal(convit_jax.load(path)[1]["params"], random_params(seed=0))
    assert "has averaged weights too; not used, because ema is off" in log.text
    assert "removed from the names: module.\n" in log.text
    assert "ignored 1 buffers rel_indices" in log.text
    equal(convit_jax.load(path, ema=True)[1]["params"], random_params(seed=1))

    content["model_ema"] = None
    for protocol in (True, False):  # zip, and the format of before 2020
        torch.save(content, path, _use_new_zipfile_serialization=protocol)
        equal(convit_jax.load(path)[1]["params"], random_params(seed=0))
        with pytest.raises(ValueError, match="holds no averaged weights"):
            convit_jax.load(path, ema=True)


def test_released_files_and_other_types(tmp_path, log):
    _, torch = reference.import_timm()
    import safetensors.torch

    state_dict = {k: torch.from_numpy(v) for k, v in to_torch(random_params()).items()}
    torch.save(state_dict, tmp_path / "bare.pth")
    equal(convit_jax.load(str(tmp_path / "bare.pth"))[1]["params"], random_params())
    halves = {k: v.bfloat16() for k, v in state_dict.items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    params = convit_jax.load(tmp_path / "half.safetensors")[1]["params"]
    equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("f"), random_params()))

    state_dict["norm.bias"][0] = float("nan")
    safetensors.torch.save_file(state_dict, tmp_path / "nan.safetensors")
    log.clear()
    params = convit_jax.load(tmp_path / "nan.safetensors")[1]["params"]
    assert np.isnan(params["norm"]["bias"][0])
    assert "NaN or infinity in norm/bias" in log.text


def test_a_workdir(tmp_path, log):
    config = digits.get_config()
    model = {"patch_size": 4, "embed_dim": 16, "depth": 3, "local_up_to_layer": 2}
    config.model.update(model)
    config.optim.ema_decay = 0.9
    options = {**model, "image_size": 8, "in_channels": 1, "num_classes": 10}
    made = create_model("convit_tiny", **options)
    run = tmp_path / "run"
    run.mkdir()
    record.record_start(Workdir(run), saved_config.to_json(config), 0, list("0123456789"), {}, {})
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint and no weights\.safetensors"):
        convit_jax.load(run)
    saved = Loaded(made, random_params(made, seed=9), "", mean=(0.1,), std=(0.2,))
    safetensors.save_weights(run / "weights.safetensors", saved)
    equal(convit_jax.load(run)[1]["params"], saved.params)

    top1 = {1: (0.3, 0.1), 2: (0.2, 0.8), 3: None}
    with Checkpoints(run / "checkpoints", every=1, also=(), keep=3) as checkpoints:
        for step, metrics in top1.items():
            state = {
                "step": jnp.array(step),
                "params": jax.tree.map(jnp.asarray, random_params(made, seed=step)),
                "ema": jax.tree.map(jnp.asarray, random_params(made, seed=10 + step)),
            }
            metrics = metrics and dict(zip(("top1", "ema_top1"), metrics, strict=True))
            checkpoints.save(step, state, dict, metrics=metrics)
    log.clear()
    loaded = read_weights(run)
    assert [r.getMessage() for r in log.records if r.levelno >= logging.WARNING] == []  # Orbax's
    assert "weights of step 1, the best checkpoint by top-1" in log.text
    equal(loaded.params, random_params(made, seed=1))
    assert loaded.class_names == tuple("0123456789")
    assert (loaded.mean, loaded.std, loaded.crop_pct) == (config.data.mean, config.data.std, 1.0)
    assert loaded.metrics == {"top1": 0.3}
    assert loaded.model == made.clone(drop_path=config.model.drop_path)
    assert read_weights(run, num_classes=3).metrics is None  # those of another head
    for dtype in (jnp.float32, jnp.bfloat16):  # features are float32 in any case
        model, variables = convit_jax.load(run, num_classes=0, dtype=dtype)
        images = jax.ShapeDtypeStruct((2, 8, 8, 1), dtype)
        found = jax.eval_shape(model.apply, variables, images)
        assert (found.shape, found.dtype) == ((2, 16), jnp.float32)
    assert "the run has averaged weights too; not used" in log.text
    assert (loaded.step, loaded.ema, loaded.chosen) == (1, False, "the best checkpoint by top-1")
    for ema in (True, None):  # None is what the run hands out
        log.clear()
        averaged = read_weights(run, ema=ema)
        equal(averaged.params, random_params(made, seed=12))
        assert (averaged.step, averaged.ema, averaged.metrics) == (2, True, {"top1": 0.8})
        assert (
            "averaged weights of step 2, the best checkpoint by top-1 of the averaged weights\n"
            in log.text
        )
    assert read_weights(run, checkpoint="newest").chosen == "the newest checkpoint"

    for file in (run / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    with pytest.raises(OSError, match="1: cannot read this checkpoint"):
        convit_jax.load(run)
    config.optim.ema_decay = 0.0
    record.record_start(Workdir(run), saved_config.to_json(config), 0, list("0123456789"), {}, {})
    with pytest.raises(ValueError, match=r"has no averaged weights \(optim.ema_decay=0\)"):
        convit_jax.load(run, ema=True)
    assert read_weights(run, ema=None, checkpoint="2").ema is False
    with pytest.raises(FileNotFoundError, match=r"expected a workdir of main\.py"):
        convit_jax.load(tmp_path)


def test_timm_reads_our_export(tmp_path):
    _, torch = reference.import_timm()
    from safetensors.torch import load_file as load_torch
    from timm.models.convit import ConVit

    path = tmp_path / "weights.safetensors"
    safetensors.save_weights(path, Loaded(MODEL, random_params()))
    theirs = ConVit(
        img_size=16, patch_size=4, num_classes=5, embed_dim=4, num_heads=4, depth=3,
        local_up_to_layer=2,
    )  # fmt: skip
    theirs.load_state_dict(load_torch(path), strict=True)
    for name, array in load_file(path).items():
        assert torch.equal(theirs.state_dict()[name], torch.from_numpy(array))
