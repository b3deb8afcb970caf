"""PyTorch weights in and out: same logits and gradients; every lost or unknown key is an error."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax import ConViT, create_model, from_torch, to_torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "mlp_ratio": 2.0}
MODELS = {
    "convit": ConViT(**SMALL, depth=3, local_up_to_layer=2),
    "deit": ConViT(**SMALL, depth=2, local_up_to_layer=0, cls_pos_embed=True, qkv_bias=True),
}


def load_golden(name):
    """Returns images, logits, state dict and gradients (see golden/make.py)."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        parts = {"state": {}, "grad": {}}
        for key in arrays.files:
            part, _, tensor = key.partition("/")
            if tensor:
                parts[part][tensor] = arrays[key]
        return arrays["images"], arrays["logits"], parts["state"], parts["grad"]


@pytest.mark.parametrize("positional", ["blend", "contract"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_the_golden_arrays(name, positional):
    images, logits, state_dict, grads = load_golden(name)
    model = MODELS[name].clone(positional=positional)

    def loss(params):
        out = model.apply({"params": params}, images)
        return jnp.sum(
            out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        ), out

    (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(from_torch(state_dict))
    np.testing.assert_allclose(out, logits, atol=2e-5 * np.abs(logits).max())
    largest = max(np.abs(g).max() for g in grads.values())
    for key, value in to_torch(grad).items():
        # The gradient of the positional bias is 0; PyTorch's is rounding noise of its softmax.
        scale = largest if key.endswith("pos_proj.bias") else np.abs(grads[key]).max()
        np.testing.assert_allclose(value, grads[key], atol=1e-4 * scale, err_msg=key)


def check_against_timm(model, positionals=("blend",)):
    """Compares logits and converts there and back, with random values in every tensor."""
    _, torch = reference.import_timm()
    theirs = reference.timm_like(model)
    reference.randomise(theirs, torch, seed=0)
    images = np.random.default_rng(0).standard_normal((2, *model.image_shape), np.float32)
    with torch.no_grad():
        expected = theirs(reference.timm_images(images, torch)).numpy()
    params = from_torch(theirs.state_dict())
    for positional in positionals:
        logits = jax.jit(model.clone(positional=positional).apply)({"params": params}, images)
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())

    back = to_torch(params)
    state_dict = theirs.state_dict()
    assert back.keys() == state_dict.keys()
    for key, tensor in state_dict.items():
        np.testing.assert_array_equal(back[key], tensor.numpy(), err_msg=key)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)


# Grids of 7 x 11 and 11 x 7 patches.
@pytest.mark.parametrize(("name", "size"), [("convit", (28, 44)), ("deit", (44, 28))])
def test_logits_of_rectangles_equal_timms(name, size):
    check_against_timm(MODELS[name].clone(image_size=size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
def test_logits_equal_timms(name):
    """In float32 with precision 'highest'. tests/model/intermediates_test.py has all variants."""
    positionals = ("blend", "contract") if name == "convit_tiny" else ("blend",)
    check_against_timm(create_model(name), positionals)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_to_the_bit(name):
    _, _, state_dict, _ = load_golden(name)
    params = from_torch(state_dict)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes["params"])
    back = to_torch(jax.tree.map(jnp.asarray, params))
    assert back.keys() == state_dict.keys()
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
        assert back[key].flags.writeable
        assert back[key].flags.c_contiguous


def test_models_without_head_position_or_with_biases_convert():
    random = np.random.default_rng(0)
    for options in (
        {"num_classes": 0},
        {"use_pos_embed": False},
        {"qkv_bias": True},
        {"local_up_to_layer": 0},
    ):
        model = MODELS["convit"].clone(**options)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        params = jax.tree.map(lambda s: random.normal(size=s.shape).astype("f"), shapes["params"])
        again = from_torch(to_torch(params))
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_torch_tensors_of_any_float_type_and_old_buffers():
    _, torch = reference.import_timm()
    _, _, state_dict, _ = load_golden("convit")
    half = {k: torch.from_numpy(v).bfloat16().requires_grad_() for k, v in state_dict.items()}
    half["blocks.0.attn.rel_indices"] = torch.zeros(1, 16, 16, 3)
    params = from_torch(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = from_torch({k: v.astype(jnp.bfloat16) for k, v in state_dict.items()})
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_result_shares_no_memory_with_the_input():
    _, _, state_dict, _ = load_golden("convit")
    params = from_torch(state_dict)
    before = params["cls_token"].copy()
    state_dict["cls_token"] += 1
    np.testing.assert_array_equal(params["cls_token"], before)


def test_every_key_that_does_not_fit_is_named():
    _, _, state_dict, _ = load_golden("convit")
    bad = dict(state_dict)
    del bad["blocks.1.norm2.bias"], bad["head.bias"]
    bad["blocks.0.attn.v.weight"] = np.zeros((8, 16))
    bad["blocks.2.attn.qkv.weight"] = np.zeros((3, 16, 16))
    bad["head_dist.weight"] = np.zeros((5, 16))
    with pytest.raises(ValueError, match="not the state dict of a ConViT or DeiT") as error:
        from_torch(bad)
    first, *lines = str(error.value).splitlines()
    assert "it seems to be a distilled DeiT (dist_token, head_dist)" in first
    assert lines == [
        "  missing: blocks.1.norm2.bias (16,)",
        "  missing: head.bias (5,)",
        "  not known: head_dist.weight (5, 16)",
        "  wrong shape: blocks.0.attn.v.weight: expected (16, 16), got (8, 16)",
        "  wrong shape: blocks.2.attn.qkv.weight: expected (48, 16), got (3, 16, 16)",
    ]
    with pytest.raises(ValueError, match=r"norm\.bias: expected floating-point .* got int32"):
        from_torch({**state_dict, "norm.bias": np.zeros(16, np.int32)})
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn\.qkv\.weight"):
        from_torch({"conv1.weight": np.zeros((64, 3, 7, 7))})

    params = from_torch(state_dict)
    params["gpsa_blocks"]["attn"]["gate"] = np.zeros((2, 3))
    params["extra"] = np.zeros(1)
    del params["last_block"]["mlp"]["fc1"]
    with pytest.raises(ValueError, match="not the parameters of a ConViT or DeiT") as error:
        to_torch(params)
    lines = str(error.value).splitlines()[1:]
    assert "  wrong shape: gpsa_blocks/attn/gate: expected (2, 4), got (2, 3)" in lines
    assert "  missing: last_block/mlp/fc1/kernel (16, 32)" in lines
    assert "  not known: extra (1,)" in lines
    with pytest.raises(ValueError, match=r"pass variables\['params'\]"):
        to_torch({"params": params})
