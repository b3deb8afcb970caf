"""Attention maps, beside those that timm computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small_models import MODEL, random_params

from convit_jax import attention_gradients, class_attention

IMAGES = np.random.default_rng(1).standard_normal((2, 12, 20, 3), np.float32)


@pytest.mark.parametrize("family", ["convit", "deit"])
def test_the_class_tokens_maps_are_timms(family):
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair(family)
    plain = [0, 1, 2][model.local_up_to_layer :]
    maps, gates = jax.jit(functools.partial(class_attention, model))(variables, IMAGES)
    expected, _ = reference.timm_maps(theirs, IMAGES, torch)
    expected = [expected[i].detach().numpy()[:, :, 0, 1:] for i in plain]
    np.testing.assert_allclose(maps, np.reshape(expected, (len(plain), 2, 4, 3, 5)), atol=2e-6)
    layers = theirs.blocks[: model.local_up_to_layer]
    expected = [torch.sigmoid(layer.attn.gating_param).detach().numpy() for layer in layers]
    np.testing.assert_allclose(gates, np.reshape(expected, (len(layers), 4)), atol=1e-6)


@pytest.mark.parametrize("family", ["convit", "deit"])
def test_gradients_with_respect_to_the_maps_are_pytorchs(family):
    """Of another logit for each image."""
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair(family)
    maps, logits = reference.timm_maps(theirs, IMAGES, torch)
    (logits[0, 1] + logits[1, 3]).backward()
    if family == "convit":  # the maps are written out whatever these say
        model = model.clone(positional="contract", attention="chunked", remat="block")
    score = lambda logits: logits[0, 1] + logits[1, 3]  # noqa: E731
    compute = jax.jit(functools.partial(attention_gradients, model, score=score))
    for found, part in zip(compute(variables, IMAGES), ("values", "gradients"), strict=True):
        layers = [*found.get("gpsa_blocks", ()), *found["blocks"]]
        for layer, expected in zip(layers, maps, strict=True):
            expected = (expected.detach() if part == "values" else expected.grad).numpy()
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(layer, expected, atol=atol, err_msg=part)


def test_offsets_change_the_maps_or_are_refused():
    """An offset makes the last map uniform, as scores of zero do."""
    variables = {"params": random_params()}
    images = np.ones((2, 16, 16, 3), np.float32)
    qkv = variables["params"]["last_block"]["attn"]["qkv"]
    apply = jax.jit(functools.partial(MODEL.apply, return_attention=True))
    logits, maps = apply(variables, images)
    uniform = {"blocks": 1 / 17 - maps["blocks"]["content"]}
    moved, unmoved = apply(variables, images, attention_offsets=uniform)
    qkv["kernel"] = np.hstack([np.zeros((16, 32), "f"), qkv["kernel"][:, 32:]])
    expected, _ = apply(variables, images)
    np.testing.assert_allclose(moved, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(unmoved["blocks"]["content"], maps["blocks"]["content"], atol=1e-5)
    assert np.abs(moved - logits).max() > 0.1
    for offsets, message in (
        ({"block": 0}, "attention_offsets: expected some of gpsa_blocks, blocks, got 'block'"),
        ({"blocks": jnp.zeros((2, 2, 4, 5, 5))}, r"'blocks'\]: expected \(1, batch, heads"),
        ({"blocks": jnp.zeros((1, 2, 4, 4, 4))}, r"expected the map's shape \(2, 4, 17, 17\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(variables, images, attention_offsets=offsets)
