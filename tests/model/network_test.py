"""ConViT: sizes, options and their errors, initialisation against timm, precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scipy import stats

from benchmarks import peer
from convit_jax import ConViT, create_model, from_torch, to_torch
from convit_jax.model.block import drop_samples

# Small, with a rectangular grid of 4 x 6 patches.
SMALL = {
    "image_size": (16, 24),
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 16,
    "depth": 4,
    "local_up_to_layer": 3,
}
IMAGES = np.random.default_rng(0).standard_normal((3, 16, 24, 3), np.float32)


def init(model, images=IMAGES, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), images)


def shapes(model, images=IMAGES):
    """Returns the shapes of a model's variables, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), images)


def apply(model, variables, images=IMAGES, **options):
    rngs = options.pop("rngs", None)
    return jax.jit(functools.partial(model.apply, **options))(variables, images, rngs=rngs)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("convit_tiny", 5_710_512),
        ("convit_tiny_plus", 9_972_912),
        ("convit_small", 27_777_322),
        ("convit_small_plus", 48_979_882),
        ("convit_base", 86_540_040),
        ("convit_base_plus", 153_134_856),
        ("deit_tiny", 5_717_416),
        ("deit_tiny_plus", 9_982_184),
        ("deit_small", 22_050_664),
        ("deit_small_plus", 49_000_744),
        ("deit_base", 86_567_656),
        ("deit_base_plus", 153_171_944),
    ],
)
def test_parameter_counts(name, count):
    """Exact counts for the models of the paper's Table 1; timm's ViT for the DeiT "+" sizes."""
    found = shapes(create_model(name), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == count


def test_stacked_parameters_and_output_shapes():
    model = ConViT(**SMALL)
    variables = init(model)
    params = variables["params"]
    assert params["gpsa_blocks"]["attn"]["gate"].shape == (3, 4)
    assert params["last_block"]["attn"]["qkv"]["kernel"].shape == (16, 48)
    plain = shapes(model.clone(local_up_to_layer=1))["params"]
    assert plain["blocks"]["attn"]["qkv"]["kernel"].shape == (2, 16, 48)
    logits = apply(model, variables)
    assert logits.shape == (3, 5)
    assert logits.dtype == jnp.float32
    assert apply(model.clone(global_pool="avg"), variables).shape == (3, 5)
    assert apply(model.clone(global_pool="none"), variables).shape == (3, 25, 5)
    features = model.clone(num_classes=0)
    assert "head" not in shapes(features)["params"]
    assert apply(features, init(features)).shape == (3, 16)


def test_pools_take_what_they_say():
    model = ConViT(**SMALL, global_pool="none")
    variables = init(model)
    every = apply(model, variables)
    token = apply(model.clone(global_pool="token"), variables)
    average = apply(model.clone(global_pool="avg"), variables)
    np.testing.assert_allclose(token, every[:, 0], atol=1e-6)
    np.testing.assert_allclose(average, every[:, 1:].mean(1), atol=1e-6)


def test_results_do_not_depend_on_unroll_remat_and_flat_tokens():
    """With dropout and stochastic depth on: values, gradients and the random draws."""
    sizes = SMALL | {"local_up_to_layer": 1}  # one GPSA block, two plain ones, and the last
    model = ConViT(**sizes, dropout=0.1, attn_dropout=0.1, drop_path=0.3)
    variables = init(model)
    rngs = {"dropout": jax.random.key(3)}

    def value_and_grad(model):
        def loss(variables):
            return jnp.sum(jnp.sin(model.apply(variables, IMAGES, train=True, rngs=rngs)))

        return jax.jit(jax.value_and_grad(loss))(variables)

    expected = value_and_grad(model.clone(remat="none"))
    for options in ({"unroll": True, "remat": "block", "flat_tokens": False}, {"remat": "mlp"}):
        close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5, err_msg=options)
        jax.tree.map(close, value_and_grad(model.clone(**options)), expected)

    def stored(remat):
        """Bytes that a step holds beside its arguments and results."""
        deep = ConViT(**SMALL | {"depth": 12, "local_up_to_layer": 11}, remat=remat)
        loss = jax.grad(lambda variables: deep.apply(variables, IMAGES).sum())
        return jax.jit(loss).lower(shapes(deep)).compile().memory_analysis().temp_size_in_bytes

    nothing, dots, block = (stored(remat) for remat in ("none", "dots", "block"))
    assert block < 0.7 * dots < 0.7 * 0.7 * nothing


def test_forms_of_the_positional_part_agree():
    model = ConViT(**SMALL)
    variables = init(model)
    np.testing.assert_allclose(
        apply(model, variables), apply(model.clone(positional="contract"), variables), atol=1e-6
    )


def test_drop_path_drops_whole_samples_at_each_layers_rate():
    """Block i only adds 1 to channel i, so the features tell which blocks were dropped."""
    depth, samples = 4, 1000
    model = ConViT(**SMALL | {"num_classes": 0}, drop_path=0.6, global_pool="none")
    params = jax.tree.map(jnp.zeros_like, init(model)["params"])
    for i in range(depth):
        fc2 = params["gpsa_blocks" if i < 3 else "last_block"]["mlp"]["fc2"]
        fc2["bias"] = fc2["bias"].at[..., i].set(jnp.arange(3) == i if i < 3 else 1.0)
    params["norm"]["scale"] += 1.0
    images = np.repeat(IMAGES[:1], samples, axis=0)
    rngs = {"dropout": jax.random.key(0)}
    patches = apply(model, {"params": params}, images, train=True, rngs=rngs)[:, 1:]
    kept = np.asarray(patches[..., :depth] > patches[..., -1:])
    assert (kept == kept[:, :1]).all()  # all patches of a sample together
    np.testing.assert_allclose(kept.mean(axis=(0, 1)), [1.0, 0.8, 0.6, 0.4], atol=0.05)
    both = (kept[:, 0, 1] & kept[:, 0, 2]).mean()  # layers of one scan draw on their own
    np.testing.assert_allclose(both, 0.8 * 0.6, atol=0.05)
    # Kept branches are scaled so that the mean is that of evaluation.
    keep = drop_samples(jnp.ones((samples, 2)), jnp.float32(0.25), jax.random.key(1))
    assert set(np.unique(keep)) == {0, np.float32(1 / 0.75)}
    still = apply(model, {"params": params}, images)[:, 1:]
    assert (still[..., :depth] > still[..., -1:]).all()


def test_attention_maps_come_from_the_layers_true_inputs():
    """Compared with timm: get_attention of each block, on its input in a forward pass."""
    _, torch = reference.import_timm()
    from timm.models.convit import ConVit

    theirs = ConVit(
        img_size=16, patch_size=4, num_classes=5, embed_dim=4, depth=3, num_heads=4,
        local_up_to_layer=2,
    ).eval()  # fmt: skip
    reference.randomise(theirs, torch, seed=0)
    inputs = []
    for block in theirs.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = np.random.default_rng(1).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        theirs(reference.timm_images(images, torch))
        expected = [theirs.blocks[i].attn.get_attention(inputs[i]).numpy() for i in range(2)]
    model = ConViT(**SMALL | {"image_size": 16, "depth": 3, "local_up_to_layer": 2})
    params = from_torch(theirs.state_dict())
    logits, maps = apply(model, {"params": params}, images, return_attention=True)
    np.testing.assert_allclose(maps["gpsa_blocks"]["blended"], expected, atol=2e-6)
    assert maps["gpsa_blocks"]["positional"].shape == (2, 4, 16, 16)
    assert maps["gpsa_blocks"]["gate"].shape == (2, 4)
    assert maps["blocks"]["content"].shape == (1, 2, 4, 17, 17)
    np.testing.assert_allclose(maps["blocks"]["content"].sum(-1), 1, atol=2e-6)
    # Without maps the last block computes one token only, so rounding differs.
    without_maps = apply(model, {"params": params}, images)
    np.testing.assert_allclose(logits, without_maps, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    model = create_model("convit_tiny")
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3), np.float32)
    variables = init(model, images)
    # Weights at which the maps and gates matter, and logits of order 1.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda p: p + rng.normal(0, 0.03, p.shape).astype(np.float32), variables
    )
    high = apply(model, variables, images)
    low = apply(model.clone(dtype=jnp.bfloat16), variables, images)
    assert low.dtype == jnp.float32
    assert np.abs(high).max() > 0.5
    np.testing.assert_allclose(low, high, atol=3e-2 * np.abs(high).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convit", "deit"])
def test_initialisation_statistics_are_timms(family):
    """Each layer is compared: fixed values exactly, and random values by their distribution."""
    _, torch = reference.import_timm()
    torch.manual_seed(0)
    theirs = {k: v.numpy() for k, v in peer.make(f"{family}_tiny").state_dict().items()}
    ours = to_torch(init(create_model(f"{family}_tiny"), np.zeros((1, 224, 224, 3)))["params"])
    assert ours.keys() == theirs.keys()
    if family == "deit":  # timm's ViT starts the class token at 1e-6; DeiT's own code at 0.02
        assert 0.015 < ours.pop("cls_token").std() < 0.025
    for key, value in ours.items():
        expected = theirs[key]
        if np.ptp(expected) == 0 or key.endswith("attn.v.weight"):
            np.testing.assert_array_equal(value, expected, err_msg=key)
        elif key.endswith("pos_proj.weight"):
            np.testing.assert_array_equal(value, expected, err_msg=key)  # 4 heads: all are set
        else:
            p = stats.ks_2samp(value.ravel(), expected.ravel()).pvalue
            assert p > 1e-5, (key, p)
    bound = 768**-0.5
    patches = ours["patch_embed.proj.weight"]
    assert 0.999 * bound < np.abs(patches).max() <= bound
    # PyTorch's bounds of +-2 are absolute, so values beyond 2 standard deviations do occur.
    weights = ours["blocks.0.mlp.fc1.weight"]
    assert 0.03 < np.mean(np.abs(weights) > 0.04) < 0.06
    # Every layer has values of its own.
    layers = [ours[f"blocks.{i}.mlp.fc1.weight"] for i in range(12)]
    assert len({layer.tobytes() for layer in layers}) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim=16, got 5"),
        ({"image_size": (16, 22)}, r"expected a multiple of patch_size=4, got \(16, 22\)"),
        ({"patch_size": 0}, "expected a multiple of patch_size=0"),
        ({"local_up_to_layer": 4}, "local_up_to_layer: expected 0 to depth - 1 = 3, got 4"),
        ({"local_up_to_layer": -1}, "local_up_to_layer: expected 0 to depth - 1 = 3, got -1"),
        ({"global_pool": "max"}, "expected one of .*'token', 'avg', 'none'.*, got 'max'"),
        ({"cls_pos_embed": True}, "cls_pos_embed: expected local_up_to_layer=0"),
        ({"drop_path": 1.0}, r"drop_path: expected a rate in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "num_classes: expected 0 or more, got -1"),
        ({"positional": "dense"}, "positional: expected auto or one of .*, got 'dense'"),
        ({"patchsize": 4}, "unknown options of convit_tiny: .* patch_size, .*, got patchsize"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("convit_tiny", **SMALL | options)


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"expected one of convit_tiny, .*, got 'convit_huge'"):
        create_model("convit_huge")


def test_images_that_do_not_fit_are_refused():
    model = ConViT(**SMALL)
    variables = init(model)
    cases = [
        (IMAGES[..., :1], r"expected \(batch, height, width, 3\), got \(3, 16, 24, 1\)"),
        (IMAGES[0], r"expected \(batch, height, width, 3\), got \(16, 24, 3\)"),
        (IMAGES[:, :8], r"expected 16 x 24 pixels .*, got 8 x 24"),
    ]
    for images, message in cases:
        with pytest.raises(ValueError, match=message):
            model.apply(variables, images)
    free = model.clone(use_pos_embed=False)
    variables = init(free)
    assert apply(free, variables, IMAGES[:, :8]).shape == (3, 5)
    with pytest.raises(ValueError, match=r"multiple of patch_size=4, got \(7, 24\)"):
        free.apply(variables, IMAGES[:, :7])


def test_a_model_inside_a_module_has_the_name_it_is_given():
    class Regressor(nn.Module):
        @nn.compact
        def __call__(self, images):
            model = create_model(
                "convit_tiny",
                name="backbone",
                num_classes=0,
                image_size=8,
                depth=2,
                local_up_to_layer=1,
                patch_size=4,
            )
            return nn.Dense(1)(model(images))

    shapes = jax.eval_shape(Regressor().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert set(shapes["params"]) == {"backbone", "Dense_0"}
