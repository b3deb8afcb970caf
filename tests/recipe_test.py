"""Configurations: all of them can be locked, built and initialised; errors name wrong keys."""

import importlib.util

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from runs import ROOT

from convit_jax import VARIANTS, recipe
from convit_jax.train import setup

CONFIGS = ROOT / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))

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
    config.model.name = base.model.name
    config.train.batch_size, config.optim.lr = base.train.batch_size, base.optim.lr
    assert config == base


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


def test_an_image_is_a_square_or_height_and_width():
    config = load("convit_ti").lock()
    for size, pixels in ((160, (160, 160)), ((224, 320), (224, 320))):
        config.model.image_size = size
        recipe.check(config)
        model = setup.make_model(config)
        assert (model.image_shape, model.grid) == ((*pixels, 3), (pixels[0] // 16, pixels[1] // 16))
        assert [t.size for t in setup.make_transforms(config, model)] == [pixels, pixels]


@pytest.mark.parametrize(
    "size", [0, -224, True, 224.0, "224x320", None, (), (224,), (224, 320, 3), (224, 0), [224, 320]]
)
def test_what_is_no_image_size_is_refused(size):
    config = load("convit_ti")
    config.model.image_size = size
    with pytest.raises(ValueError, match="does not fit") as error:
        recipe.check(config)
    assert str(error.value).splitlines()[1:] == [
        "  model.image_size: expected the side of a square or (height, width), each a whole number "
        f"of pixels, got {size!r}"
    ]


def test_every_key_is_read():
    """Every key of the recipe must have an effect."""
    code = "".join(path.read_text() for path in (CONFIGS.parent / "convit_jax").glob("*.py"))
    config = recipe.get_config()
    for section in ("data", "train", "optim", "mesh"):
        for key in config[section]:
            assert f"{section}.{key}" in code or f'"{key}"' in code or f".{key}" in code, key
    single = {key for key in config if not isinstance(config[key], ml_collections.ConfigDict)}
    for key in single:
        assert f"config.{key}" in code
    # The other sections are passed as a whole to functions that have arguments of these names.
    assert set(config.keys()) - single == {
        "model", "data", "augment", "mixup", "train", "optim", "mesh", "checkpoint"
    }  # fmt: skip
