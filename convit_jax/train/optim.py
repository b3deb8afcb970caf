"""The optimiser of the recipe: learning rate, decay, AdamW, averaged weights, accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

LossFn = Callable[[Any, Any, jax.Array], jax.Array]


def learning_rate(
    config: ml_collections.ConfigDict, batch_size: int, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """Linear warm-up, then cosine, by step.

    The end points are DeiT's (timm's CosineLRScheduler): the cosine counts from step 0, not from
    the end of the warm-up, so it begins a little below the peak.

    Args:
      config: `config.optim`.
      batch_size: global; scales the peak by batch_size / 512 (DeiT, section 6).
      steps_per_epoch: steps in an epoch.
      total_steps: the step at which the rate is `min_lr`.
    """
    peak = config.lr * batch_size / 512
    warmup_steps = config.warmup_epochs * steps_per_epoch

    def schedule(step: jax.Array) -> jax.Array:
        warm = config.warmup_lr + (peak - config.warmup_lr) * step / max(warmup_steps, 1)
        half_turn = jnp.cos(jnp.pi * jnp.minimum(step / total_steps, 1))
        cosine = config.min_lr + (peak - config.min_lr) * (1 + half_turn) / 2
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule


def decay_mask(params: Any) -> Any:
    """True for what weight decay acts on: matrices, by name.

    Biases, scales of norms, gates, the class token and the position embedding have none. Not by
    rank, as in PyTorch: stacked layers give a bias two axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW as `config.optim` says, behind clipping by the norm of all gradients if it is on.

    Clipping scales the gradients by min(1, clip_norm / norm), before they enter the moments.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """decay * ema + (1 - decay) * params, after each update of the parameters.

    The average begins as a copy of the initial parameters, as in timm's ModelEmaV2; nothing
    corrects for that. None, for no average, stays None.
    """
    return None if ema is None else optax.incremental_update(params, ema, 1 - decay)


def mean_gradients(
    loss_fn: LossFn, params: Any, batch: Any, key: jax.Array, accum_steps: int
) -> tuple[jax.Array, Any]:
    """The loss of a batch and its gradients, of `accum_steps` parts of the batch one at a time.

    Memory for activations is that of one part; the gradients are summed in float32. With a
    mean over images as the loss, the result is that of the whole batch but for rounding. On
    several devices the gradients are summed over them once for each part.

    Args:
      loss_fn: (params, batch, key) -> the mean loss over the batch's images.
      params: of the model.
      batch: a tree of arrays with the leading axis B.
      key: of the randomness; every part gets a key of its own.
      accum_steps: 1 is the whole batch at once.
    """
    if accum_steps == 1:
        return jax.value_and_grad(loss_fn)(params, batch, key)

    def add(sums: Any, part_and_key: Any) -> tuple[Any, None]:
        found = jax.value_and_grad(loss_fn)(params, *part_and_key)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (jnp.zeros(()), params))
    parts = split_batch(batch, accum_steps), jax.random.split(key, accum_steps)
    sums, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accum_steps, sums)


def split_batch(batch: Any, parts: int) -> Any:
    """Arrays (B, ...) -> (parts, B / parts, ...): image i goes to part i % parts.

    Each part so has an equal share of every device's images, if the number of those is a multiple
    of `parts`; otherwise, and with contiguous parts, images would move between devices.

    Raises:
      ValueError: if B is not a multiple of `parts`.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"batch: expected a multiple of {parts} images, got {x.shape[0]}")
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
