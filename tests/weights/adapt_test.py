"""Weights adapted to another model: as timm does, and only as far as asked for."""

import logging

import numpy as np
import pytest
import reference
from small_models import MODEL, random_params

from convit_jax.weights import adapt

NOTHING = {"new_head": False, "resize_pos_embed": False, "adapt_channels": False}
EVERYTHING = dict.fromkeys(NOTHING, True)


@pytest.mark.parametrize("source_grid", [None, (7, 28)])
@pytest.mark.parametrize("grid", [(14, 14), (7, 9), (24, 24), (3, 5), (28, 7), (7, 28)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_position_embedding_is_resampled_as_by_timm(grid, prefix, source_grid):
    _, torch = reference.import_timm()
    from timm.layers import resample_abs_pos_embed

    pos_embed = np.random.default_rng(0).normal(size=(1, prefix + 196, 8)).astype("f")
    expected = resample_abs_pos_embed(
        torch.from_numpy(pos_embed), list(grid), source_grid, num_prefix_tokens=prefix
    )
    out = adapt.resample_pos_embed(pos_embed, grid, prefix, source_grid)
    np.testing.assert_allclose(out, expected.numpy(), atol=2e-6)


def test_a_grid_that_is_not_that_of_the_embedding_is_an_error():
    with pytest.raises(ValueError, match="expected a grid of 3 x 3 patches, got 12 patches"):
        adapt.resample_pos_embed(np.zeros((1, 12, 8)), (4, 4))


@pytest.mark.parametrize(("channels", "wanted"), [(3, 1), (3, 2), (3, 3), (3, 4), (3, 7), (2, 1)])
def test_first_convolution_is_adapted_as_by_timm(channels, wanted):
    _, torch = reference.import_timm()
    from timm.models import adapt_input_conv

    kernel = np.random.default_rng(0).normal(size=(4, 4, channels, 8)).astype("f")
    expected = adapt_input_conv(wanted, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    adapted = adapt.adapt_input_conv(kernel, wanted).transpose(3, 2, 0, 1)
    assert adapted.dtype == np.float32
    np.testing.assert_allclose(adapted, expected.numpy(), rtol=1e-6, atol=1e-7)


def test_channels_that_cannot_be_adapted_are_an_error():
    with pytest.raises(ValueError, match="weights of 3 input channels to make 3 from, got"):
        adapt.adapt_input_conv(np.zeros((4, 4, 2, 8)), 3)


def test_fitting_changes_what_it_names_and_nothing_else(caplog):
    params = random_params()
    same = adapt.fit_params(params, MODEL, **NOTHING)
    assert all(a is b for a, b in zip(same.values(), params.values(), strict=True))

    other = MODEL.clone(num_classes=3, image_size=(16, 24), in_channels=1)
    with pytest.raises(ValueError, match="the weights do not fit the model") as error:
        adapt.fit_params(params, other, **NOTHING)
    assert str(error.value).splitlines()[1:] == [
        "  head/bias: expected (3,), got (5,)",
        "  head/kernel: expected (16, 3), got (16, 5)",
        "  patch_embed/kernel: expected (4, 4, 1, 16), got (4, 4, 3, 16)",
        "  pos_embed: expected (1, 24, 16), got (1, 16, 16)",
    ]
    with caplog.at_level(logging.INFO, logger="convit_jax"):
        fitted = adapt.fit_params(params, other, **EVERYTHING)
    assert caplog.messages == [
        "new head for 3 classes",
        "position embedding interpolated from 16 to 24 tokens, a grid of 4 x 6",
        "first convolution adapted from 3 to 1 input channels",
    ]
    assert fitted["head"]["kernel"].shape == (16, 3)
    assert 0 < np.abs(fitted["head"]["kernel"]).max() < 0.1
    assert fitted["pos_embed"].shape == (1, 24, 16)
    for key in params.keys() - {"head", "pos_embed", "patch_embed"}:
        assert fitted[key] is params[key]
    assert fitted["patch_embed"]["bias"] is params["patch_embed"]["bias"]

    headless = adapt.fit_params(params, MODEL.clone(num_classes=0), **EVERYTHING)
    assert headless.keys() == params.keys() - {"head"}
    deeper = MODEL.clone(depth=4)
    with pytest.raises(ValueError, match=r"blocks/attn/proj/bias: expected \(1, 16\), got nothing"):
        adapt.fit_params(params, deeper, **EVERYTHING)
