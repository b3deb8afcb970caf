"""Attention maps, beside those that timm computes."""

import functools

import jax
import numpy as np
import pytest
import reference

from convit_jax import class_attention

IMAGES = np.random.default_rng(1).standard_normal((2, 12, 20, 3), np.float32)


def timm_maps(theirs, torch):
    """The attention maps of every layer of timm's model in a forward pass, and its logits.

    The maps keep their gradients.
    """
    maps = []

    def keep(module, args, output):
        output.retain_grad()
        maps.append(output)

    for block in theirs.blocks:
        block.attn.attn_drop.register_forward_hook(keep)
    logits = theirs(reference.timm_images(IMAGES, torch))
    return maps, logits


@pytest.mark.parametrize("family", ["convit", "deit"])
def test_the_class_tokens_maps_are_timms(family):
    _, torch = reference.import_timm()
    theirs, model, variables = reference.timm_pair(family)
    plain = [0, 1, 2][model.local_up_to_layer :]
    maps, gates = jax.jit(functools.partial(class_attention, model))(variables, IMAGES)
    expected, _ = timm_maps(theirs, torch)
    expected = [expected[i].detach().numpy()[:, :, 0, 1:] for i in plain]
    np.testing.assert_allclose(maps, np.reshape(expected, (len(plain), 2, 4, 3, 5)), atol=2e-6)
    layers = theirs.blocks[: model.local_up_to_layer]
    expected = [torch.sigmoid(layer.attn.gating_param).detach().numpy() for layer in layers]
    np.testing.assert_allclose(gates, np.reshape(expected, (len(layers), 4)), atol=1e-6)
