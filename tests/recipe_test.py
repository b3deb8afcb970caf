"""Configurations: all of them can be locked, built and initialised; errors name wrong keys."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from runs import ROOT

from convit_jax import VARIANTS, ablations, recipe, saved_config
from convit_jax.cli import options
from convit_jax.model.variants import OPTIONS, options_of_kind, variant_of
from convit_jax.train import freezing, setup

CONFIGS = ROOT / "configs"
NAMES = sorted({path.stem for path in CONFIGS.glob("*.py")} - {"__init__"})

PAPER = [name for name in NAMES if name.startswith(("convit_", "deit_"))]


def load(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config=configs/{name}.py" in module.__doc__
    return module.get_config()


@pytest.mark.parametrize("name", NAMES)
def test_config_locks_builds_and_initialises(name):
    config = load(name).lock()
    recipe.check(config)
    model = setup.make_model(config)
    setup.make_transforms(config, model)
    images = jnp.zeros((1, *model.image_shape))
    jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(AttributeError):
        config.model.dpeth = 3


def test_every_variant_has_its_config():
    assert {load(name).model.name for name in PAPER} == set(VARIANTS)
    assert len(PAPER) == len(VARIANTS)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_differ_in_name_batch_and_rate_only(name):
    config, base = load(name), recipe.get_config()
    expected = (512, 4e-4) if name.endswith("_plus") else (1024, 5e-4)
    assert (config.train.batch_size, config.optim.lr) == expected
    config.model.name = base.model.name  # None
    config.train.batch_size, config.optim.lr = base.train.batch_size, base.optim.lr
    assert config == base


def test_the_rows_of_table_3_are_what_the_paper_says():
    for row, gate, local, frozen in (
        ("a", 1, True, set()),
        ("b", 0, True, {"gate"}),
        ("c", 1, False, set()),
        ("d", 0, False, {"gate"}),
        ("f", 0, True, {"gate", "pos_proj"}),
        ("g", 0, False, {"gate", "pos_proj"}),
    ):
        config = options.configuration(f"ablations:{row}", [])
        model = setup.make_model(config)
        assert (variant_of(model), model.gate_init) == ("convit_small_plus", gate)
        assert model.use_local_init == local
        found = set()
        if config.optim.freeze:
            images = jnp.zeros((1, *model.image_shape))
            params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
            mask = freezing.find(config.optim.freeze, params, None).mask
            leaves = jax.tree_util.tree_leaves_with_path(mask)
            found = {path[2].key for path, is_frozen in leaves if is_frozen}
        assert found == frozen
    model = setup.make_model(options.configuration(str(CONFIGS / "ablations.py:e"), []))
    assert variant_of(model) == "deit_small_plus"
    assert set(ablations.TABLE_3) == set("abcdefg")
    for base, message in (
        ("ablations:h", "Table 3: expected one of the rows a, b, c, d, e, f, g, got 'h'"),
        ("convit_b:x", r"convit_b.py offers no choice: leave out :x"),
        ("nothing:x", "no file nothing:x; expected a file, or one of ablations, cifar10"),
    ):
        with pytest.raises(ValueError, match=message):
            options.configuration(base, [])


def test_overrides_reach_the_model():
    config = load("convit_ti")
    config.model.update(depth=4, local_up_to_layer=2, image_size=32, patch_size=8, unroll=2)
    config.train.update(dtype="bfloat16", remat="block")
    model = setup.make_model(config)
    assert (model.depth, model.local_up_to_layer, model.image_size) == (4, 2, 32)
    assert (model.num_heads, model.embed_dim, model.unroll, model.remat) == (4, 192, 2, "block")
    assert model.dtype == jnp.bfloat16


def test_every_problem_is_named():
    config = load("digits")
    config.modle = 3
    config.train.log_evry = 4
    config.optim.something_else = 1
    del config.seed
    config.model.depth = None  # left to the variant: fine
    del config.augment.pad_crop
    config.augment.pad_crop = "1"
    config.train.epochs = 3  # an integer where a float is expected: fine
    with pytest.raises(ValueError, match="does not fit") as error:
        recipe.check(config)
    lines = str(error.value).splitlines()[1:]
    assert "  unknown key: modle (did you mean model?)" in lines
    assert "  unknown key: train.log_evry (did you mean train.log_every?)" in lines
    assert any(
        line.startswith("  unknown key: optim.something_else (known: b1, b2") for line in lines
    )
    assert "  missing key: seed" in lines
    assert "  augment.pad_crop: expected int, got '1'" in lines
    assert len(lines) == 5


def test_an_image_is_a_square_or_a_rectangle():
    config = load("convit_ti").lock()
    for size, pixels in ((160, (160, 160)), ("224x320", (224, 320)), ("96", (96, 96))):
        config.model.image_size = size
        recipe.check(config)
        model = setup.make_model(config)
        assert (model.image_shape, model.grid) == ((*pixels, 3), (pixels[0] // 16, pixels[1] // 16))
        assert [t.size for t in setup.make_transforms(config, model)] == [pixels, pixels]


@pytest.mark.parametrize("size", [0, -224, True, 224.0, (), (224, 320), "224,320", "224x0"])
def test_anything_else_is_refused_as_an_image_size(size):
    config = load("convit_ti")
    config.model.image_size = size
    with pytest.raises(ValueError, match=r"model.image_size: expected a number of pixels"):
        recipe.check(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.epochs", 0.0, "train.epochs: expected more than 0, got 0.0"),
        ("optim.ema_decay", 1.0, "optim.ema_decay: expected less than 1, got 1.0"),
        ("optim.weight_decay", -0.1, "optim.weight_decay: expected 0 or more, got -0.1"),
        ("train.epochs", float("nan"), "train.epochs: expected more than 0, got nan"),
        ("train.dtype", "half", "train.dtype: expected one of .* got 'half'"),
    ],
)
def test_values_out_of_bounds_are_refused(name, value, message):
    config = recipe.get_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        recipe.check(config)


def test_a_configuration_survives_json():
    config = load("convit_ti")
    config.model.image_size = "8x12"
    saved = json.loads(json.dumps(saved_config.to_json(config)))
    assert saved["format_version"] == saved_config.FORMAT_VERSION
    assert saved_config.from_json(saved, "config.json") == config
    assert saved_config.differences(saved_config.from_json(saved, "config.json"), config) == {}


def test_a_run_of_an_earlier_version_is_told_what_is_computed_otherwise():
    for name, version, keys in (
        ("convit_ti", 1, ["mixup.group_size"]),
        ("convit_ti", 2, []),
        ("digits", 1, ["augment.crop=pad"]),
        ("cifar10", 1, ["mixup.group_size", "augment.crop=pad"]),
        ("cifar10", 2, ["augment.crop=pad"]),
        ("cifar10", saved_config.FORMAT_VERSION, []),
    ):
        config = load(name)
        saved = saved_config.to_json(config) | {"format_version": version}
        texts = saved_config.changes_since(saved, config)
        assert [text.partition(":")[0] for text in texts] == keys


def test_older_configurations_take_defaults_and_later_ones_are_refused():
    saved = json.loads(json.dumps(saved_config.to_json(load("convit_ti"))))
    del saved["format_version"], saved["optim"]["ema_decay"], saved["mesh"]
    saved["model"]["image_size"] = [8, 12]
    read = saved_config.from_json(saved, "config.json")
    assert (read.model.image_size, read.optim.ema_decay, read.mesh.fsdp) == ("8x12", 0.0, 1)
    saved["train"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"config.json: not the .*: unknown key: train.momentum"):
        saved_config.from_json(saved, "config.json")
    with pytest.raises(ValueError, match=r"config.json: written by a later version"):
        saved_config.from_json({"format_version": saved_config.FORMAT_VERSION + 1}, "config.json")


def test_what_may_change_between_two_starts():
    config, other = recipe.get_config(), recipe.get_config()
    other.update_from_flattened_dict({"train.epochs": 7.0, "data.workers": 3, "optim.b1": 0.5})
    found = saved_config.differences(config, other)
    assert found == {
        "data.workers": "data.workers: saved None, now 3",
        "optim.b1": "optim.b1: saved 0.9, now 0.5",
        "train.epochs": "train.epochs: saved 300.0, now 7.0",
    }
    assert set(found) - recipe.MAY_CHANGE == {"optim.b1"}


def test_the_models_keys_are_its_options():
    keys = {name.removeprefix("model.") for name in recipe.KEYS if name.startswith("model.")}
    assert keys == {"name", *OPTIONS} - {"dtype", "remat"}  # these two are train's
    computed = {f"model.{name}" for name in options_of_kind("computation")}
    model_keys = {name for name in recipe.KEYS if name.startswith("model.")}
    assert recipe.MAY_CHANGE & model_keys == computed & model_keys


def test_every_key_is_read():
    """Every key of the recipe must have an effect."""
    code = "".join(path.read_text() for path in (ROOT / "convit_jax").rglob("*.py"))
    passed_whole = {"model", "augment", "mixup", "checkpoint"}  # to functions with these arguments
    for name in recipe.KEYS:
        section, _, leaf = name.rpartition(".")
        if section not in passed_whole:
            read = (
                rf"config\.{name}\b|config\.{leaf}\b|data\.{leaf}\b"
                if section
                else rf"config\.{leaf}\b"
            )
            assert re.search(read, code), name
