"""The recipe's optimiser: learning rate, AdamW, averaged weights and gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from convit_jax.train.freezing import Frozen

_STACKED = ("gpsa_blocks", "blocks")  # groups with a leading layer axis, in the model's order

LossFn = Callable[[Any, Any, jax.Array], jax.Array]


def learning_rate(
    config: ml_collections.ConfigDict, batch_size: int, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine.

    The cosine counts from step 0, not from the end of the warm-up, so it begins a little below the
    peak. This is as in DeiT (timm's CosineLRScheduler).

    Args:
      config: the section `optim` of the configuration.
      batch_size: global batch size; scales the peak by batch_size / 512 (DeiT, section 6), unless
        `scale_lr` is off.
      steps_per_epoch: number of steps in an epoch.
      total_steps: step at which the rate is `min_lr`.
    """
    peak = config.lr * (batch_size / 512 if config.scale_lr else 1)
    warmup_steps = config.warmup_epochs * steps_per_epoch

    def schedule(step: jax.Array) -> jax.Array:
        warm = config.warmup_lr + (peak - config.warmup_lr) * step / max(warmup_steps, 1)
        half_turn = jnp.cos(jnp.pi * jnp.minimum(step / total_steps, 1))
        cosine = config.min_lr + (peak - config.min_lr) * (1 + half_turn) / 2
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for parameters with weight decay, the matrices.

    Biases, scales of norms, gates, the class token and the position embedding have no decay.
    Matrices are recognised by name. The rank, used in PyTorch, does not tell them: biases of
    stacked layers have two axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Returns a tree of factors of the learning rate, as timm's param_groups_layer_decay.

    The head has the factor 1, and each layer `decay` times that of the layer after it. The layers
    are: the embeddings and the class token; each block; the head. The last norm belongs to the last
    block. The factors of stacked blocks have the shape (layers, 1, ...).

    Args:
      params: the parameters, or their updates.
      decay: factor from each layer to the layer before it.
    """
    counts = [len(params[g]["norm1"]["scale"]) if g in params else 0 for g in _STACKED]
    depth = sum(counts) + 1
    first = dict(zip(_STACKED, (1, 1 + counts[0]), strict=True))
    first |= {"last_block": depth, "norm": depth, "head": depth + 1}

    def scale(path: Any, leaf: jax.Array) -> np.ndarray:
        group = path[0].key
        layers = np.array(first.get(group, 0))
        if group in _STACKED:
            layers = layers + np.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1))
        return np.float32(decay) ** (depth + 1 - layers)

    return jax.tree_util.tree_map_with_path(scale, params)


def _by_layer(updates: Any, decay: float) -> Any:
    return jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay))


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, frozen: Frozen | None = None
) -> optax.GradientTransformation:
    """Returns AdamW with the settings of `config.optim`, after gradient clipping if that is on.

    Clipping multiplies the gradients by min(1, clip_norm / norm), where norm is the norm of all
    gradients together. AdamW's moments are computed from the clipped gradients. The state is that
    of `optax.adamw`, unless parameters are frozen or `layer_decay` is on.

    Args:
      config: the section `optim` of the configuration.
      schedule: learning rate by step.
      frozen: parameters that are frozen. Their updates are meaningless: `frozen.kept` must follow.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    parts = [
        adam if frozen is None else frozen.optimizer(adam),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.layer_decay != 1:
        parts.append(optax.stateless(lambda updates, _: _by_layer(updates, config.layer_decay)))
    adamw = optax.chain(*parts)
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Returns decay * ema + (1 - decay) * params, the averaged weights after an update of `params`.

    The average begins as a copy of the initial parameters, as in timm's ModelEmaV2, and has no
    bias correction. If `ema` is None, there is no average, and None is returned.
    """
    return None if ema is None else optax.incremental_update(params, ema, 1 - decay)


def mean_gradients(
    loss_fn: LossFn, params: Any, batch: Any, key: jax.Array, accum_steps: int
) -> tuple[jax.Array, Any]:
    """Returns the loss of a batch and its gradients, computed in parts one after another.

    Memory for activations is that of one part. The gradients are summed in float32. Since the loss
    is a mean over images, the result is that of the whole batch except for rounding. Several
    devices sum their gradients once for each part.

    Args:
      loss_fn: (params, batch, key) -> mean loss over the images of the batch.
      params: parameters of the model.
      batch: tree of arrays with the leading axis B.
      key: random key; every part gets its own.
      accum_steps: number of parts; 1 computes the whole batch at once.

    Raises:
      ValueError: if B is not a multiple of `accum_steps`.
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
    """Splits a batch into parts: arrays (B, ...) -> (parts, B / parts, ...).

    Image i goes to part i % parts. So each part has an equal share of every device's images, if
    their number is a multiple of `parts`. With contiguous parts, images would move between devices.

    Raises:
      ValueError: if B is not a multiple of `parts`.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"batch: expected a multiple of {parts} images, got {x.shape[0]}")
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
