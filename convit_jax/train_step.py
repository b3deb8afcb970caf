"""One step of training, and the state that it takes from one to the next."""

from collections.abc import Callable
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from convit_jax import mixup, optim, sharding
from convit_jax.model import ConViT


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step; the number of finished steps is in it."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any = None  # the averaged weights, if there are any


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: ConViT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics). Its randomness is that of (seed, step).

    The batch is "image" (B, height, width, channels) uint8, "label" (B,) and "skipped" (B,), the
    number of corrupt images that each stands for. The metrics are "loss", "grad_norm", the norm of
    the gradients before clipping, "learning_rate", "skipped_images" and, of a model with GPSA,
    "gates": (layers,), the mean of sigmoid(gate) over the heads, after the step.

    The old state is donated: do not use it again.
    """
    key = jax.random.key(config.seed)

    def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        images, labels = batch
        # Split parameters are gathered; left to itself, XLA would rather move activations.
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy(logits, labels).mean()

    def train_step(
        state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        augmented = mixup.augment_batch(
            batch["image"],
            batch["label"],
            augment_key,
            num_classes=model.num_classes,
            mean=config.data.mean,
            std=config.data.std,
            smoothing=config.train.label_smoothing,
            **config.mixup,
        )
        loss, grads = optim.mean_gradients(
            loss_fn, state.params, augmented, dropout_key, config.train.accum_steps
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "skipped_images": batch["skipped"].sum(),
        }
        if "gpsa_blocks" in params:
            gate = params["gpsa_blocks"]["attn"]["gate"]  # (layers, H)
            metrics["gates"] = jax.nn.sigmoid(gate).mean(axis=-1)
        ema = optim.update_ema(state.ema, params, config.optim.ema_decay)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    state_shardings = _shardings(abstract_state(model, optimizer, config, mesh))
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, sharding.over_batch(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def abstract_state(
    model: ConViT,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainState:
    """The shapes, types and shardings of a state, as `jax.ShapeDtypeStruct`."""
    shapes = jax.eval_shape(functools.partial(_first_state, model, optimizer, config))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.by_shape(shapes, mesh),
    )


def init_state(
    model: ConViT,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, made on the devices where it belongs."""
    shardings = _shardings(abstract_state(model, optimizer, config, mesh))
    init = functools.partial(_first_state, model, optimizer, config)
    return jax.jit(init, out_shardings=shardings)()


def _first_state(
    model: ConViT, optimizer: optax.GradientTransformation, config: ml_collections.ConfigDict
) -> TrainState:
    images = jnp.zeros((1, *model.image_shape))
    params = model.init(jax.random.key(config.seed), images)["params"]
    ema = params if config.optim.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
