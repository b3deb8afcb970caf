"""Frozen parameters: their bits, their optimiser state, and what follows when they are trained."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from convit_jax import ConViT, ablations, recipe
from convit_jax.parallel import sharding
from convit_jax.train import freezing, optim, setup
from convit_jax.train.step import Program
from convit_jax.workdir.checkpoints import Checkpoints

OPTIM = recipe.get_config().optim
SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
SIZES |= {"num_classes": 10, "local_up_to_layer": 1}
MODEL = ConViT(**SIZES)


def test_a_frozen_parameter_later_begins_as_in_torch():
    """In PyTorch, a parameter without gradients has no state, and its norm is not clipped."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": np.float32([[1, -0.0, 2]])}, "b": {"bias": np.float32([3, 4])}}
    params = jax.tree.map(jnp.asarray, params)
    frozen = freezing.find("a/.*", params, steps=3)
    config = OPTIM.copy_and_resolve_references()
    config.clip_norm = 1.0
    schedule = optim.learning_rate(config, 512, steps_per_epoch=2, total_steps=50)
    optimizer = optim.make_optimizer(config, schedule, frozen)
    first, state = params, optimizer.init(params)
    a, b = theirs = [torch.tensor(np.array(leaf)) for leaf in jax.tree.leaves(params)]
    groups = [{"params": [a]}, {"params": [b], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    for step in range(8):
        grads = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        for tensor, leaf in zip(theirs, jax.tree.leaves(grads), strict=True):
            tensor.grad = None if tensor is a and step < 3 else torch.tensor(np.array(leaf))
        torch.nn.utils.clip_grad_norm_([p for p in theirs if p.grad is not None], 1.0)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
        updates, state = optimizer.update(frozen.gradients(step, grads), state, params)
        params = frozen.kept(step, params, optax.apply_updates(params, updates))
        if step == 2:
            assert params["a"]["kernel"].tobytes() == first["a"]["kernel"].tobytes()
        for ours, tensor in zip(jax.tree.leaves(params), theirs, strict=True):
            np.testing.assert_allclose(ours, tensor.numpy(), atol=1e-6)


def test_what_is_frozen_for_good_keeps_its_bits_and_has_no_state(tmp_path, caplog):
    """Row f of the paper's Table 3, with frozen norms besides."""
    caplog.set_level(logging.INFO, "convit_jax")
    config = recipe.get_config()
    config.model.update(name="convit_tiny", **SIZES)
    ablations.apply(config, "f")
    config.train.batch_size = 8
    config.mixup.group_size = 8
    config.optim.update(freeze=f"{config.optim.freeze}, .*norm.*", ema_decay=0.9, lr=0.1)
    program = Program.make(config, setup.make_model(config), sharding.make_mesh(), 1.0, 10)
    names = {"gate", "pos_proj", "norm1", "norm2", "norm"}
    state = program.init_state()
    first = jax.device_get(state)
    assert "frozen for the whole run: 180 of 7,742" in caplog.text
    moments = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
               for key in path if isinstance(key, jax.tree_util.DictKey)}  # fmt: skip
    assert "patch_embed" in moments
    assert not moments & names
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(10, size=8, dtype=np.int32),
        "skipped": np.zeros(8, np.int32),
    }
    batch = sharding.put_batch(batch, program.mesh)
    step = program.jitted_step().lower(state, batch).compile()
    ends = []
    for resumed in (False, True):
        state = jax.device_put(first, program.state_shardings)
        for number in range(3):
            state, metrics = step(state, batch)
            if resumed and number == 1:  # a state without some moments survives Orbax
                folder = tmp_path / "checkpoints"
                with Checkpoints(folder, every=1, keep=1, also=(), best_by=("top1",)) as saved:
                    saved.save(2, state, dict)
                    _, state, *_ = saved.restore(program.abstract_state)
        ends.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    for kind in ("params", "ema"):
        before, after = (
            jax.tree_util.tree_leaves_with_path(getattr(s, kind)) for s in (first, state)
        )
        for (path, old), (_, new) in zip(before, after, strict=True):
            is_frozen = any(key.key in names for key in path)
            assert (old.tobytes() == np.asarray(new).tobytes()) == is_frozen, path
    assert not np.any(state.params["gpsa_blocks"]["attn"]["gate"])
    assert metrics["grad_norm"] > 0


def test_what_cannot_be_frozen_is_refused():
    deit = small_models.random_params(small_models.DEIT)
    for freeze, message in (
        ("gates", "'gates' matches no parameter; expected one of backbone, gates, positional, "
         "gpsa, or a regular .* among blocks/attn/proj/bias, .*, pos_embed"),
        ("backbone, blocks", "'blocks' matches no parameter"),
        ("blocks/(", r"'blocks/\(' is not a regular expression"),
        ("backbone, head/.*", "leaves no parameter to train"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"optim.freeze: .*{message}"):
            freezing.find(freeze, deit, None)
    frozen = freezing.find("backbone", deit, None)
    assert {
        path[0].key for path, f in jax.tree_util.tree_leaves_with_path(frozen.mask) if not f
    } == {"head"}
    config = recipe.get_config()
    config.optim.freeze_epochs = 2.0
    with pytest.raises(ValueError, match=r"optim.freeze_epochs=2: expected optim.freeze with it"):
        Program.make(config, MODEL, sharding.make_mesh(), 1.0, 10)
