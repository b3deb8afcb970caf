"""Feature maps of chosen blocks and pooled features, beside those that timm computes."""

import functools

import jax
import numpy as np
import pytest
import reference
from small_models import MODEL, random_params

from convit_jax import VARIANTS, create_model
from convit_jax.weights.state_dict import from_torch

IMAGES = np.random.default_rng(1).standard_normal((2, 12, 20, 3), np.float32)


@pytest.mark.parametrize("family", ["convit", "deit"])
def test_features_are_those_of_timms_forward_intermediates(family):
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair(family)
    images = reference.timm_images(IMAGES, torch)

    def close(ours, expected):
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())

    with torch.no_grad():
        logits, pooled = theirs(images), theirs.forward_features(images)
        pooled = theirs.forward_head(pooled, pre_logits=True)
    headless = model.clone(num_classes=0, remat="block", unroll=True)
    for norm, ours, output in ((False, model, logits), (True, headless, pooled)):
        forward = functools.partial(ours.apply, return_features=(2, 0, -2), norm_features=norm)
        found, features = jax.jit(jax.checkpoint(forward))(variables, IMAGES)
        close(found, output.numpy())
        with torch.no_grad():
            expected = theirs.forward_intermediates(images, norm=norm, intermediates_only=True)
        for block, found in zip((2, 0, 1), features, strict=True):
            close(found, expected[block].permute(0, 2, 3, 1).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_features_and_maps_of_every_variant_are_timms(name):
    """Of a rectangle of 5 x 7 patches, with random values in every tensor."""
    _, torch = reference.import_timm()
    model = create_model(name, image_size=(80, 112), remat="none")
    theirs = reference.timm_like(model)
    reference.randomise(theirs, torch, seed=0)
    images = np.random.default_rng(0).standard_normal((2, 80, 112, 3), np.float32)
    blocks = (0, 9, 11)
    with torch.no_grad():
        maps, logits = reference.timm_maps(theirs, images, torch)
        features = theirs.forward_intermediates(
            reference.timm_images(images, torch), indices=blocks, intermediates_only=True
        )
    apply = functools.partial(model.apply, return_attention=True, return_features=blocks)
    ours, found, seen = jax.jit(apply)({"params": from_torch(theirs.state_dict())}, images)
    gpsa = found["gpsa_blocks"]["blended"] if model.local_up_to_layer else ()
    pairs = [("logits", ours, logits.numpy())]
    pairs += [
        (f"block {block}", feature, expected.permute(0, 2, 3, 1).numpy())
        for block, feature, expected in zip(blocks, seen, features, strict=True)
    ]
    pairs += [
        (f"map {layer}", ours, expected.numpy())
        for layer, (ours, expected) in enumerate(
            zip([*gpsa, *found["blocks"]["content"]], maps, strict=True)
        )
    ]
    for what, ours, expected in pairs:
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=what)


def test_features_of_blocks_that_the_model_lacks_are_refused():
    images = np.zeros((1, 16, 16, 3), np.float32)
    variables = {"params": random_params()}
    shapes = jax.eval_shape(
        functools.partial(MODEL.apply, return_features=(), return_attention=True), variables, images
    )
    assert (len(shapes), shapes[2]) == (3, ())
    for blocks, message in (
        ((0, 3), "return_features: expected blocks 0 to 2, or -3 to -1 from the last, got 3"),
        ([-4], "or -3 to -1 from the last, got -4"),
        (2, "in a tuple or list, got 2"),
        ((0.5,), r"from the last, got \(0\.5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL.apply(variables, images, return_features=blocks)
