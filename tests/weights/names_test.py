"""Names of tensors: prefixes come off, and other models are recognised."""

import logging

import pytest
from small_models import MODEL, random_params

from convit_jax import from_torch, to_torch
from convit_jax.weights.names import seems_to_be, without_prefixes

NAMES = dict.fromkeys(to_torch(random_params(MODEL)), 0)


@pytest.mark.parametrize(
    ("prefix", "logged"),
    [
        ("", ""),
        ("module.", "module."),
        ("module._orig_mod.", "_orig_mod., module."),
        ("_orig_mod.module.", "_orig_mod., module."),
        ("model.", "model."),
        ("net.module.backbone._orig_mod.", "_orig_mod., module., net.backbone."),
    ],
)
def test_prefixes_of_any_order_and_depth_come_off(prefix, logged, caplog):
    caplog.set_level(logging.INFO, logger="convit_jax")
    prefixed = {prefix + name: i for i, name in enumerate(NAMES)}
    assert without_prefixes("x.pth", prefixed) == {name: i for i, name in enumerate(NAMES)}
    assert caplog.messages == ([f"x.pth: removed from the names: {logged}"] if logged else [])


def test_prefixes_inside_names_come_off_and_ambiguous_ones_stay():
    inside = {name.replace("blocks.1.", "blocks.1._orig_mod."): 0 for name in NAMES}
    assert without_prefixes("", inside) == NAMES
    averaged = {"n_averaged": 1} | {f"module.{name}": 0 for name in NAMES}
    assert without_prefixes("", averaged) == NAMES
    others = {f"model.{name}": 0 for name in NAMES} | {"loss.weight": 0}
    assert without_prefixes("", others) == others
    with pytest.raises(ValueError, match=r"the same name below several prefixes: cls_token, mod"):
        without_prefixes("", NAMES | {f"module.{name}": 0 for name in NAMES})


@pytest.mark.parametrize(
    ("name", "seems"),
    [
        ("dist_token", "a distilled DeiT"),
        ("blocks.0.gamma_1", "LayerScale"),
        ("blocks.0.ls1.gamma", "LayerScale"),
        ("vit.embeddings.cls_token", "a model of transformers"),
        ("encoder.layers.encoder_layer_0.mlp.0.bias", "a ViT of torchvision"),
        ("exp_avg", "the state of an optimiser"),
        ("ema.cls_token", "a model among other things: 1 of 2 names begin with 'ema.'"),
    ],
)
def test_the_error_begins_with_what_it_seems_to_be(name, seems):
    assert seems in (seems_to_be([name, "x.y"]) or "")
    assert seems_to_be(NAMES) is None


def test_an_error_shows_ten_names_of_each_kind():
    state_dict = to_torch(random_params(MODEL))
    others = {f"model.{name}": array for name, array in state_dict.items()}
    with pytest.raises(ValueError, match="not the state dict of a ConViT or DeiT") as error:
        from_torch({**others, "loss.weight": state_dict["cls_token"]})
    first, *lines = str(error.value).splitlines()
    count = len(others)
    assert first.endswith(f"among other things: {count} of {count + 1} names begin with 'model.':")
    kinds = [line.split(":")[0].strip() for line in lines]
    assert (kinds.count("missing"), kinds.count("not known"), len(kinds)) == (11, 11, 22)
    assert lines[-1] == f"  not known: {count + 1 - 10} more"
