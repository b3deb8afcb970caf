"""Schedule, decay groups, update and average, compared with PyTorch and timm; accumulation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import small_models

from benchmarks import peer
from convit_jax import ConViT, recipe, to_torch
from convit_jax.parallel import sharding
from convit_jax.train import optim
from convit_jax.train.step import Program

OPTIM = recipe.get_config().optim
MODEL = ConViT(
    image_size=16, patch_size=4, embed_dim=16, depth=3, local_up_to_layer=2, num_classes=10
)


def test_schedule_has_the_recipes_end_points():
    schedule = optim.learning_rate(OPTIM, 1024, steps_per_epoch=10, total_steps=3000)
    unscaled = OPTIM.copy_and_resolve_references()
    unscaled.update(lr=1e-3, scale_lr=False)
    steps = np.arange(0, 3000, 100)
    same = optim.learning_rate(unscaled, 16, steps_per_epoch=10, total_steps=3000)(steps)
    np.testing.assert_array_equal(same, schedule(steps))
    assert schedule(0) == pytest.approx(1e-6)
    assert schedule(25) == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-5)  # middle of the warm-up
    peak = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * 50 / 3000)) / 2
    assert schedule(50) == pytest.approx(peak, rel=1e-6)  # the cosine counts from step 0
    assert schedule(1500) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-5)
    assert schedule(3000) == pytest.approx(1e-5)
    assert schedule(4000) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("batch_size", "steps_per_epoch", "epochs"), [(1024, 12, 300), (512, 40, 20), (256, 3, 7)]
)
def test_schedule_equals_timms(batch_size, steps_per_epoch, epochs):
    _, torch = reference.import_timm()
    from timm.scheduler import CosineLRScheduler

    total = epochs * steps_per_epoch
    peak = 5e-4 * batch_size / 512
    theirs = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=peak),
        t_initial=total,
        lr_min=1e-5,
        warmup_t=5 * steps_per_epoch,
        warmup_lr_init=1e-6,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    steps = range(total + 10)
    expected = []
    for step in steps:
        theirs.step_update(step)
        expected.append(theirs.optimizer.param_groups[0]["lr"])
    ours = optim.learning_rate(OPTIM, batch_size, steps_per_epoch, total)(np.arange(len(steps)))
    # Near its zero, 1 + cos is exact to 1e-7, so the rate is exact to 1e-7 of the peak.
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7 * peak)


def test_only_matrices_decay():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    mask = jax.tree_util.tree_flatten_with_path(optim.decay_mask(shapes))[0]
    kept = {jax.tree_util.keystr(path, simple=True, separator="/") for path, m in mask if not m}
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, m in mask if m}
    assert {"cls_token", "pos_embed", "gpsa_blocks/attn/gate", "norm/scale"} < kept
    assert {"gpsa_blocks/attn/proj/bias", "patch_embed/bias", "last_block/norm1/scale"} < kept
    assert decayed == {
        "patch_embed/kernel",
        "head/kernel",
        *(f"gpsa_blocks/attn/{name}/kernel" for name in ("qk", "v", "proj", "pos_proj")),
        *(f"last_block/attn/{name}/kernel" for name in ("qkv", "proj")),
        *(
            f"{group}/mlp/{fc}/kernel"
            for group in ("gpsa_blocks", "last_block")
            for fc in ("fc1", "fc2")
        ),
    }


def test_decay_groups_equal_timms():
    reference.import_timm()
    from timm.models.convit import ConVit
    from timm.optim import param_groups_weight_decay

    theirs = ConVit(
        img_size=16, patch_size=4, embed_dim=4, depth=3, local_up_to_layer=2, num_classes=10,
        num_heads=4,
    )  # fmt: skip
    groups = param_groups_weight_decay(
        theirs, weight_decay=0.05, no_weight_decay_list=theirs.no_weight_decay()
    )
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    expected = {name: id(p) in decayed for name, p in theirs.named_parameters()}

    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    mask = jax.tree.map(np.full_like, params, optim.decay_mask(params))
    ours = {name: set(array.flat) for name, array in to_torch(mask).items()}
    assert ours == {name: {float(decays)} for name, decays in expected.items()}
    assert 0 < sum(expected.values()) < len(expected)


@pytest.mark.parametrize("clip_norm", [0.0, 4.5])
def test_updates_equal_torchs_adamw(clip_norm):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(3, 4))}, "b": {"bias": rng.normal(size=(2, 4))}}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    grads = rng.normal(size=(50, 20)).astype(np.float32)
    clipped = np.linalg.norm(grads, axis=1) > 4.5
    assert 10 < clipped.sum() < 40  # those of some steps only
    config = OPTIM.copy_and_resolve_references()
    config.clip_norm = clip_norm
    schedule = optim.learning_rate(config, 512, steps_per_epoch=2, total_steps=50)
    optimizer = optim.make_optimizer(config, schedule)
    state = optimizer.init(params)

    theirs = [torch.tensor(np.array(leaf)) for leaf in jax.tree.leaves(params)]
    groups = [
        {"params": theirs[:1], "weight_decay": OPTIM.weight_decay},
        {"params": theirs[1:], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
    for step, grad in enumerate(grads):
        tree = {"a": {"kernel": grad[:12].reshape(3, 4)}, "b": {"bias": grad[12:].reshape(2, 4)}}
        updates, state = optimizer.update(tree, state, params)
        params = optax.apply_updates(params, updates)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        for tensor, leaf in zip(theirs, jax.tree.leaves(tree), strict=True):
            tensor.grad = torch.tensor(np.array(leaf))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        adamw.step()
    for ours, tensor in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.numpy(), atol=1e-6)


def test_layers_have_timms_rates():
    reference.import_timm()
    from timm.optim import param_groups_layer_decay

    convit = ConViT(image_size=16, patch_size=4, embed_dim=16, depth=5, local_up_to_layer=2)
    for model in (convit, small_models.DEIT):
        theirs = peer.like(model)
        groups = param_groups_layer_decay(theirs, layer_decay=0.7)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        params = small_models.random_params(model)
        ours = jax.tree.map(
            lambda scale, p: np.broadcast_to(scale, p.shape),
            optim.layer_scales(params, 0.7),
            params,
        )
        found = {name: set(np.unique(x)) for name, x in to_torch(ours).items()}
        expected = {name: {np.float32(scales[id(p)])} for name, p in theirs.named_parameters()}
        assert found.keys() == expected.keys()
        for name, values in found.items():
            np.testing.assert_allclose(list(values), list(expected[name]), rtol=1e-6, err_msg=name)
        assert len(set(map(float, scales.values()))) == model.depth + 2

    config = OPTIM.copy_and_resolve_references()
    grads = jax.tree.map(np.ones_like, params)
    updates = []
    for config.layer_decay in (1.0, 0.7):
        optimizer = optim.make_optimizer(config, optax.constant_schedule(0.1))
        update = jax.jit(optimizer.update)
        updates.append(jax.device_get(update(grads, jax.jit(optimizer.init)(params), params)[0]))
    scaled = jax.tree.map(np.multiply, updates[0], optim.layer_scales(params, 0.7))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates[1], scaled)
    # Without it, the state is optax's own, as in the checkpoints of earlier versions.
    config.layer_decay = 1.0
    plain, state = (
        jax.eval_shape(optimizer.init, params)
        for optimizer in (
            optax.adamw(lambda step: 0.1, mask=optim.decay_mask),
            optim.make_optimizer(config, lambda step: 0.1),
        )
    )
    assert jax.tree.structure(state) == jax.tree.structure(plain)


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
@pytest.mark.parametrize("decay", [0.9, 0.99996])
def test_average_equals_timms(version, decay):
    timm, torch = reference.import_timm()
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=(100, 3, 4)), axis=0, dtype=np.float32)
    model = torch.nn.Linear(4, 3, bias=False)
    update = jax.jit(functools.partial(optim.update_ema, decay=decay))

    model.weight.data = torch.from_numpy(values[0].copy())
    theirs = getattr(timm.utils, version)(model, decay=decay)
    ours = {"kernel": jnp.asarray(values[0])}
    for value in values[1:]:
        model.weight.data = torch.from_numpy(value.copy())
        theirs.update(model)
        ours = update(ours, {"kernel": value})
    np.testing.assert_allclose(ours["kernel"], theirs.module.weight.detach(), atol=1e-5)
    assert np.abs(ours["kernel"] - values[0]).max() > 0.01  # it moved
    assert optim.update_ema(None, ours, decay) is None


@pytest.fixture(scope="module")
def accumulated():
    """{parts: (compiled step, result of three steps)} for the same batches, on eight devices."""
    config = recipe.get_config()
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    config.train.batch_size = 64
    # If a gradient is rounding noise, so is Adam's update; therefore eps is above the noise.
    config.optim.update(eps=1e-4, clip_norm=0.1, ema_decay=0.5)
    mesh = sharding.make_mesh()
    model = MODEL.clone(depth=2, local_up_to_layer=1)
    schedule = optax.constant_schedule(1e-3)
    optimizer = optim.make_optimizer(config.optim, schedule)
    initial = Program(config, model, optimizer, schedule, mesh).init_state()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(64, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(10, size=64, dtype=np.int32),
        "skipped": np.zeros(64, np.int32),
    }
    batch = sharding.put_batch(batch, mesh)
    results = {}
    for accum_steps in (1, 4):
        config.train.accum_steps = accum_steps
        state = jax.tree.map(jnp.copy, initial)  # the step donates its state
        step = Program(config, model, optimizer, schedule, mesh).jitted_step()
        step = step.lower(state, batch).compile()
        for _ in range(3):
            state, metrics = step(state, batch)
        results[accum_steps] = step, jax.device_get((state, metrics))
    return results


def test_accumulated_gradients_update_as_the_whole_batch(accumulated):
    """Sums over the batch are in another order, so only rounding may differ."""
    (whole, whole_metrics), (parts, parts_metrics) = accumulated[1][1], accumulated[4][1]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-6)
    assert whole_metrics["grad_norm"] > 0.2  # above clip_norm: taken before clipping
    for left, right in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_accumulation_moves_no_images_and_saves_memory(accumulated):
    """Each part has an equal share of every device's images, so only gradients are sent."""
    pattern = r" (all-\w+|collective-\w+|reduce-scatter|ragged-all-to-all)\("
    collectives = {n: re.findall(pattern, step.as_text()) for n, (step, _) in accumulated.items()}
    assert set(collectives[1]) == {"all-reduce"}
    assert collectives[1] == collectives[4]
    temporary = {
        n: step.memory_analysis().temp_size_in_bytes for n, (step, _) in accumulated.items()
    }
    # A quarter of the activations, and the sums of the gradients; 0.50 for this model on jax 0.12.
    assert temporary[4] < 0.6 * temporary[1]


def test_parts_have_their_own_randomness():
    """If the parts shared a key, dropout would be the same in both halves of equal images."""
    batch = {"x": jnp.ones((8, 100))}

    def loss_fn(params, batch, key):
        return (params * batch["x"] * jax.random.bernoulli(key, 0.5, batch["x"].shape)).mean()

    _, grads = optim.mean_gradients(loss_fn, jnp.ones(100), batch, jax.random.key(0), 2)
    halves = [jax.random.bernoulli(k, 0.5, (4, 100)) for k in jax.random.split(jax.random.key(0))]
    np.testing.assert_allclose(grads, np.concatenate(halves).mean(axis=0) / 100, rtol=1e-5)


def test_parts_take_every_nth_image():
    parts = optim.split_batch({"label": np.arange(6), "image": np.zeros((6, 2, 2))}, 2)
    np.testing.assert_array_equal(parts["label"], [[0, 2, 4], [1, 3, 5]])
    assert parts["image"].shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match="batch: expected a multiple of 4 images, got 6"):
        optim.split_batch({"label": np.arange(6)}, 4)
