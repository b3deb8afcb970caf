"""The schedule's end points, what decays, and the update against PyTorch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from convit_jax import ConViT, optim

OPTIM = common.get_config().optim


def test_schedule_has_the_recipes_end_points():
    schedule = optim.learning_rate(OPTIM, 1024, steps_per_epoch=10, total_steps=3000)
    assert schedule(0) == pytest.approx(1e-6)
    assert schedule(25) == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-5)  # middle of the warm-up
    peak = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * 50 / 3000)) / 2
    assert schedule(50) == pytest.approx(peak, rel=1e-6)  # the cosine counts from step 0
    assert schedule(1500) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-5)
    assert schedule(3000) == pytest.approx(1e-5)
    assert schedule(4000) == pytest.approx(1e-5)


def test_only_matrices_decay():
    model = ConViT(image_size=16, patch_size=4, embed_dim=16, depth=3, local_up_to_layer=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    mask = jax.tree_util.tree_flatten_with_path(optim.decay_mask(shapes))[0]
    kept = {jax.tree_util.keystr(path, simple=True, separator="/") for path, m in mask if not m}
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, m in mask if m}
    assert {"cls_token", "pos_embed", "gpsa_blocks/attn/gate", "norm/scale"} < kept
    assert {"gpsa_blocks/attn/proj/bias", "patch_embed/bias", "blocks/norm1/scale"} < kept
    assert decayed == {
        "patch_embed/kernel",
        "head/kernel",
        *(f"gpsa_blocks/attn/{name}/kernel" for name in ("qk", "v", "proj", "pos_proj")),
        *(f"blocks/attn/{name}/kernel" for name in ("qkv", "proj")),
        *(
            f"{group}/mlp/{fc}/kernel"
            for group in ("gpsa_blocks", "blocks")
            for fc in ("fc1", "fc2")
        ),
    }


def test_updates_equal_torchs_adamw():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(3, 4))}, "b": {"bias": rng.normal(size=(2, 4))}}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    grads = rng.normal(size=(50, 20)).astype(np.float32)
    schedule = optim.learning_rate(OPTIM, 512, steps_per_epoch=2, total_steps=50)
    optimizer = optim.make_optimizer(OPTIM, schedule)
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
        adamw.step()
    for ours, tensor in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.numpy(), atol=1e-6)
