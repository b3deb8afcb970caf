"""Training: the state, the step, and the loop around it."""

from collections.abc import Callable
import dataclasses
import logging
import pathlib
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from convit_jax import data, evaluate, mixup, optim, sharding
from convit_jax.metrics import Metrics
from convit_jax.model import ConViT, create_model

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16")


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step; the number of finished steps is in it."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: ConViT,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics). Its randomness is that of (seed, step).

    The batch is "image" (B, height, width, channels) uint8 and "label" (B,); the metrics are
    the loss and the norm of the gradients. The old state is donated: do not use it again.
    """
    key = jax.random.key(config.seed)
    mean, std, smoothing = config.data.mean, config.data.std, config.train.label_smoothing

    def train_step(
        state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        images = mixup.normalise(batch["image"], mean, std)
        labels = mixup.soft_labels(batch["label"], model.num_classes, smoothing)
        rngs = {"dropout": jax.random.fold_in(key, state.step)}

        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            return optax.softmax_cross_entropy(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, split),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def init_state(
    model: ConViT, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, made on the devices."""

    def init() -> TrainState:
        params = model.init(jax.random.key(seed), jnp.zeros((1, *model.image_shape)))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=sharding.replicated(mesh))()


def make_model(config: ml_collections.ConfigDict) -> ConViT:
    """The model of `config.model`, in the precision of `config.train`."""
    if config.train.dtype not in _DTYPES:
        raise ValueError(f"train.dtype: expected one of {_DTYPES}, got {config.train.dtype!r}")
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options = {name: value for name, value in config.model.items() if value is not None}
    return create_model(**options, dtype=jnp.dtype(dtype), remat=config.train.remat)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run made ready: everything that can be checked before the first compilation has been."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    model: ConViT
    train_source: data.ArraySource
    test_source: data.ArraySource

    @property
    def steps_per_epoch(self) -> float:
        return len(self.train_source) / self.config.train.batch_size

    @property
    def total_steps(self) -> int:
        return max(1, int(self.config.train.epochs * self.steps_per_epoch))


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Run:
    """Checks a configuration and opens what it names; compiles nothing.

    Raises:
      ValueError: if the configuration has no meaning or does not fit the data.
      FileExistsError: if the working directory holds an earlier run.
      OSError: if it cannot be written.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size("train.batch_size", config.train.batch_size, mesh)
    for key in ("epochs", "eval_every", "log_every"):
        if config.train[key] <= 0:
            raise ValueError(f"train.{key}: expected more than 0, got {config.train[key]}")
    model = make_model(config)
    if not model.num_classes or model.global_pool == "none":
        raise ValueError(
            "training needs one vector of logits an image: expected model.num_classes > 0 and "
            f"model.global_pool token or avg, got {model.num_classes} and {model.global_pool}"
        )
    sources = {split: data.open_source(config.data.source, split) for split in ("train", "test")}
    _check_data(config, model, sources["train"])
    return Run(config, _claim(workdir), mesh, model, sources["train"], sources["test"])


def _check_data(config: ml_collections.ConfigDict, model: ConViT, source: data.ArraySource) -> None:
    found = source[0]["image"].shape
    if found != model.image_shape:
        raise ValueError(
            f"model.image_size and model.in_channels: expected {found} (height, width, channels) "
            f"as in {config.data.source}, got {model.image_shape}"
        )
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes: expected {source.num_classes} as in {config.data.source}, "
            f"got {model.num_classes}"
        )
    for key in ("mean", "std"):
        if len(config.data[key]) != model.in_channels:
            raise ValueError(
                f"data.{key}: expected {model.in_channels} values, got {config.data[key]}"
            )
    if len(source) < config.train.batch_size:
        raise ValueError(
            f"train.batch_size: expected at most the {len(source)} images of "
            f"{config.data.source}, got {config.train.batch_size}"
        )


def _claim(workdir: str) -> pathlib.Path:
    path = pathlib.Path(workdir)
    if (path / "metrics.jsonl").exists():
        raise FileExistsError(
            f"{path} holds an earlier run (metrics.jsonl): choose another --workdir or delete it"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def train(run: Run) -> dict[str, float]:
    """Trains, evaluates and reports.

    Writes `config.json` and `metrics.jsonl` into the working directory.

    Returns:
      The last evaluation, see `evaluate.evaluate`.

    Raises:
      FloatingPointError: at the first step whose loss is not finite.
    """
    start = time.perf_counter()
    config, mesh = run.config, run.mesh
    batch_size = config.train.batch_size
    schedule = optim.learning_rate(config.optim, batch_size, run.steps_per_epoch, run.total_steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    eval_step = evaluate.make_eval_step(run.model, config.data.mean, config.data.std, mesh)
    state = init_state(run.model, optimizer, config.seed, mesh)
    (run.workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
    _describe(run, state)

    batches = data.train_batches(run.train_source, batch_size, config.seed, config.data.pad_crop)
    batch = sharding.put_batch(next(batches), mesh)
    train_step = make_train_step(run.model, optimizer, config, mesh)
    before = time.perf_counter()
    train_step = train_step.lower(state, batch).compile()
    log.info("compiled the training step in %.1f s", time.perf_counter() - before)

    eval_steps = max(1, round(config.train.eval_every * run.steps_per_epoch))
    with Metrics(run.workdir / "metrics.jsonl", run.total_steps, batch_size) as metrics:
        pending: list[dict[str, jax.Array]] = []
        for step in range(1, run.total_steps + 1):
            state, step_metrics = train_step(state, batch)
            batch = sharding.put_batch(next(batches), mesh)  # made while the step runs
            pending.append(step_metrics)
            last = step == run.total_steps
            if step % config.train.log_every == 0 or last:
                means = _fetch(pending, step)
                metrics.train(step, means | {"learning_rate": float(schedule(step - 1))})
                pending = []
            if step % eval_steps == 0 or last:
                test = data.eval_batches(run.test_source, batch_size)
                result = evaluate.evaluate(eval_step, state.params, test, mesh)
                metrics.evaluation(step, result)
    log.info(
        "test accuracy %.2f%% (%d of %d images) after %d steps in %.0f s",
        100 * result["top1"],
        round(result["top1"] * result["images"]),
        result["images"],
        run.total_steps,
        time.perf_counter() - start,
    )
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


def _describe(run: Run, state: TrainState) -> None:
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    log.info(
        "%s: %s parameters, %s on %d x %s",
        run.config.model.name,
        f"{sum(sizes):,}",
        jnp.dtype(run.model.dtype).name,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
    )
    log.info(
        "%s: %s training and %s test images; %s steps of %d images",
        run.config.data.source,
        f"{len(run.train_source):,}",
        f"{len(run.test_source):,}",
        f"{run.total_steps:,}",
        run.config.train.batch_size,
    )
