"""Training: the state, the step, and the loop around it."""

from collections.abc import Callable
import contextlib
import logging
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from convit_jax import checkpoint, data, evaluate, mixup, optim, sharding, sources, startup
from convit_jax.metrics import Metrics
from convit_jax.model import ConViT

log = logging.getLogger(__name__)


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
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics). Its randomness is that of (seed, step).

    The batch is "image" (B, height, width, channels) uint8 and "label" (B,); the metrics are
    the loss and the norm of the gradients before clipping. The old state is donated: do not use
    it again.
    """
    key = jax.random.key(config.seed)

    def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        images, labels = batch
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
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        ema = optim.update_ema(state.ema, params, config.optim.ema_decay)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, split),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def init_state(
    model: ConViT,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, made on the devices."""

    def init() -> TrainState:
        images = jnp.zeros((1, *model.image_shape))
        params = model.init(jax.random.key(config.seed), images)["params"]
        ema = params if config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    return jax.jit(init, out_shardings=sharding.replicated(mesh))()


def train(run: startup.Run) -> dict[str, float]:
    """Trains, evaluates and reports.

    Writes `config.json`, `metrics.jsonl` and, at the end, `weights.safetensors` into the working
    directory; the averaged weights if there are any.

    Returns:
      The last evaluation, see `evaluate.evaluate`; that of the averaged weights, if there are
      any, under "ema_...".

    Raises:
      FloatingPointError: at the first step whose loss is not finite.
      data.CorruptImageError: at an image that cannot be decoded.
    """
    start = time.perf_counter()
    config, mesh = run.config, run.mesh
    batch_size = config.train.batch_size
    schedule = optim.learning_rate(config.optim, batch_size, run.steps_per_epoch, run.total_steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    eval_step = evaluate.make_eval_step(run.model, config.data.mean, config.data.std, mesh)
    state = init_state(run.model, optimizer, config, mesh)
    if run.init_params is not None:
        params = jax.device_put(run.init_params, sharding.replicated(mesh))
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        state = state.replace(params=params, ema=ema)
        log.info("starting from the weights of %s", config.init_from)
    (run.workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
    _describe(run, state)

    with contextlib.closing(TrainBatches(run)) as batches:
        batch = batches.next()
        train_step = make_train_step(run.model, optimizer, config, mesh)
        before = time.perf_counter()
        train_step = train_step.lower(state, batch).compile()
        log.info("compiled the training step in %.1f s", time.perf_counter() - before)

        eval_steps = max(1, round(config.train.eval_every * run.steps_per_epoch))
        with Metrics(run.workdir / "metrics.jsonl", run.total_steps, batch_size) as metrics:
            pending: list[dict[str, jax.Array]] = []
            for step in range(1, run.total_steps + 1):
                state, step_metrics = train_step(state, batch)
                pending.append(step_metrics)
                last = step == run.total_steps
                if not last:
                    batch = batches.next()  # made while the step runs
                if step % config.train.log_every == 0 or last:
                    means = _fetch(pending, step) | batches.report()
                    metrics.train(step, means | {"learning_rate": float(schedule(step - 1))})
                    pending = []
                if step % eval_steps == 0 or last:
                    result = _evaluate(run, eval_step, state)
                    metrics.evaluation(step, result)
    checkpoint.save_weights(
        run.workdir / "weights.safetensors", state.params if state.ema is None else state.ema
    )
    log.info("wrote %s", run.workdir / "weights.safetensors")
    best = "top1" if state.ema is None else "ema_top1"
    log.info(
        "test accuracy %.2f%% (%d of %d images) after %d steps in %.0f s",
        100 * result[best],
        round(result[best] * result["images"]),
        result["images"],
        run.total_steps,
        time.perf_counter() - start,
    )
    return result


class TrainBatches:
    """The batches of training on the devices, with the time spent waiting for them."""

    def __init__(self, run: startup.Run, start_step: int = 0):
        self._mesh = run.mesh
        self._batches = data.iterate(run.train_chunks, start_step, run.total_steps, run.workers)
        self._waited = 0.0
        self._skipped = 0

    def next(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        self._skipped += int(batch.pop("skipped"))
        return sharding.put_batch(batch, self._mesh)

    def report(self) -> dict[str, float]:
        """Seconds waited since the last report, and corrupt images skipped so far."""
        waited, self._waited = self._waited, 0.0
        return {"data_seconds": waited, "skipped_images": self._skipped}

    def close(self) -> None:
        self._batches.close()


def _evaluate(
    run: startup.Run, eval_step: evaluate.EvalStep, state: TrainState
) -> dict[str, float]:
    """Evaluates the weights, and the averaged weights if there are any under "ema_..."."""

    def result_of(params: Any) -> dict[str, float]:
        num_images = len(run.test_chunks.source)
        with contextlib.closing(data.iterate(run.test_chunks, workers=run.workers)) as batches:
            return evaluate.evaluate(eval_step, params, batches, run.mesh, num_images)

    result = result_of(state.params)
    if state.ema is not None:
        result |= {f"ema_{name}": value for name, value in result_of(state.ema).items()}
    return result


def _fetch(pending: list[dict[str, jax.Array]], step: int) -> dict[str, float]:
    """Means of the metrics of the steps up to `step`; raises if a loss is not finite."""
    values = jax.device_get(pending)
    losses = [float(value["loss"]) for value in values]
    for i, loss in enumerate(losses):
        if not jnp.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step - len(losses) + i + 1} is {loss}; those before it: "
                f"{losses[max(0, i - 5) : i]}. Try a lower optim.lr or train.dtype=float32."
            )
    return {name: float(sum(v[name] for v in values) / len(values)) for name in values[0]}


def _describe(run: startup.Run, state: TrainState) -> None:
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    log.info(
        "%s: %s parameters, %s on %d x %s",
        run.config.model.name,
        f"{sum(sizes):,}",
        jnp.dtype(run.model.dtype).name,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
    )
    log.info("training: %s", sources.describe(run.train_chunks.source))
    log.info("test: %s", sources.describe(run.test_chunks.source))
    log.info("%s steps of %d images", f"{run.total_steps:,}", run.config.train.batch_size)
