"""Twenty training steps, compared with PyTorch and timm: same weights, batches, recipe, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax import ConViT, from_torch, recipe, to_torch
from convit_jax.parallel import sharding
from convit_jax.train import optim
from convit_jax.train.step import Program, TrainState

NUM_CLASSES = 10
BATCH_SIZE = 64
STEPS = 20
STEPS_PER_EPOCH = 1  # 5 steps of warm-up, 15 of the cosine


def make_config(**options):
    """The recipe without augmentation, with a learning rate at which twenty steps learn."""
    config = recipe.get_config()
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    config.train.batch_size = BATCH_SIZE
    config.optim.lr = 0.04  # times 64 / 512: a peak of 5e-3
    config.update_from_flattened_dict(options)
    return config


def make_batches():
    """Four batches, used in turn, of uint8 images: a pattern for each class, with noise."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(size=(NUM_CLASSES, 32, 32, 3))
    labels = rng.integers(NUM_CLASSES, size=(4, BATCH_SIZE), dtype=np.int32)
    noise = rng.uniform(size=(4, BATCH_SIZE, 32, 32, 3))
    images = (255 * (0.3 * patterns[labels] + 0.7 * noise)).astype(np.uint8)
    skipped = np.zeros(BATCH_SIZE, np.int32)
    return [
        {"image": images[i % 4], "label": labels[i % 4], "skipped": skipped} for i in range(STEPS)
    ]


def make_timms():
    """timm's ConViT with its own initialisation, and its state dict before training."""
    _, torch = reference.import_timm()
    from timm.models.convit import ConVit

    torch.manual_seed(0)
    model = ConVit(
        img_size=32, patch_size=8, embed_dim=8, num_heads=4, depth=3, local_up_to_layer=2,
        num_classes=NUM_CLASSES,
    )  # fmt: skip
    return model.train(), {k: v.clone() for k, v in model.state_dict().items()}


def train_timms(config, model, batches):
    """Trains with timm and torch: returns losses, norms, weights and averaged weights."""
    _, torch = reference.import_timm()
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV2

    groups = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay()
    )
    peak = config.optim.lr * BATCH_SIZE / 512
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=STEPS,
        lr_min=1e-5,
        warmup_t=5 * STEPS_PER_EPOCH,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )
    average = ModelEmaV2(model, decay=config.optim.ema_decay)
    mean, std = (np.array(values, np.float32) for values in (config.data.mean, config.data.std))
    criterion = LabelSmoothingCrossEntropy(0.1)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        scheduler.step_update(step)
        images = (batch["image"] / np.float32(255) - mean) / std
        logits = model(reference.timm_images(images, torch))
        loss = criterion(logits, torch.from_numpy(batch["label"]).long())
        optimizer.zero_grad()
        loss.backward()
        clip_norm = config.optim.clip_norm or np.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item())
        optimizer.step()
        average.update(model)
        losses.append(loss.item())
    weights = (m.state_dict() for m in (model, average.module))
    return losses, norms, *({k: v.numpy() for k, v in w.items()} for w in weights)


def train_ours(config, state_dict, batches):
    """Returns the same from our training step on eight devices."""
    mesh = sharding.make_mesh()
    model = ConViT(
        image_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=3, local_up_to_layer=2,
        num_classes=NUM_CLASSES,
    )  # fmt: skip
    schedule = optim.learning_rate(config.optim, BATCH_SIZE, STEPS_PER_EPOCH, STEPS)
    optimizer = optim.make_optimizer(config.optim, schedule)
    params = jax.tree.map(jnp.asarray, from_torch(state_dict))
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)
    state = jax.device_put(state, sharding.replicated(mesh))
    step = Program(config, model, optimizer, schedule, mesh).jitted_step()
    history = []
    for batch in batches:
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        history.append(jax.device_get(metrics))
    losses, norms = ([float(m[name]) for m in history] for name in ("loss", "grad_norm"))
    weights = (None if tree is None else to_torch(tree) for tree in (state.params, state.ema))
    return losses, norms, *weights


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="recipe"),
        pytest.param(
            {"train.accum_steps": 2, "optim.clip_norm": 0.5, "optim.ema_decay": 0.9},
            id="accumulated-clipped-averaged",
        ),
    ],
)
def test_trajectory_equals_timms(options):
    config, batches = make_config(**options), make_batches()
    timms, state_dict = make_timms()
    losses, norms, weights, average = train_timms(config, timms, batches)
    ours, our_norms, our_weights, our_average = train_ours(config, state_dict, batches)

    assert losses[-1] < losses[0] - 0.3  # it learns
    np.testing.assert_allclose(ours, losses, rtol=1e-4)
    np.testing.assert_allclose(our_norms, norms, rtol=1e-3)
    for theirs, mine in ((weights, our_weights), (average, our_average)):
        for name in mine or ():
            # A constant added to scores does not change their softmax. So the gradient of this bias
            # is 0 here and rounding noise in torch, which Adam turns into steps.
            if not name.endswith("pos_proj.bias"):
                np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, err_msg=name)
    assert (our_average is None) == (config.optim.ema_decay == 0)
