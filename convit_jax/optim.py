"""The optimiser of the recipe: learning rate, what decays, AdamW."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax


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
    """AdamW as `config.optim` says."""
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
