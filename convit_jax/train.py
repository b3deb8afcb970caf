"""The training loop: steps, evaluations, checkpoints, and what is reported of them."""

import contextlib
import functools
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convit_jax import (
    data,
    distributed,
    evaluate,
    flops,
    optim,
    sharding,
    sources,
    startup,
    weights,
    workdir,
)
from convit_jax.checkpoint import Checkpoints
from convit_jax.interruption import Interruption
from convit_jax.metrics import Metrics
from convit_jax.profiling import Profile
from convit_jax.train_step import TrainState, TrainStep, abstract_state, init_state, make_train_step

log = logging.getLogger(__name__)


def train(run: startup.Run) -> dict[str, float] | None:
    """Trains, evaluates and reports; goes on where an earlier start of the run ended.

    Writes into the working directory (see `workdir`, `checkpoint` and `metrics`) and, at the end,
    `weights.safetensors`; the averaged weights if there are any.

    Returns:
      The last evaluation, see `evaluate.evaluate`; that of the averaged weights, if there are
      any, under "ema_...". None if the run was interrupted: it can be started again.

    Raises:
      FloatingPointError: at the first step whose loss is not finite.
      OSError: if a checkpoint or a metric cannot be written.
      data.CorruptImageError: at an image that cannot be decoded.
    """
    start = time.perf_counter()
    config, total = run.config, run.total_steps
    schedule = optim.learning_rate(
        config.optim, config.train.batch_size, run.steps_per_epoch, total
    )
    optimizer = optim.make_optimizer(config.optim, schedule)
    eval_step = evaluate.make_eval_step(run.model, config.data.mean, config.data.std, run.mesh)
    eval_every = max(1, round(config.train.eval_every * run.steps_per_epoch))
    eval_steps = frozenset((*range(eval_every, total, eval_every), total))

    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        folder, options = run.workdir / "checkpoints", config.checkpoint.to_dict()
        checkpoints = stack.enter_context(Checkpoints(folder, also=eval_steps, **options))
        state, window, result = _begin(run, optimizer, checkpoints)
        step, stopped = int(state.step), False
        if step < total:
            batches = stack.enter_context(contextlib.closing(TrainBatches(run, step)))
            batch = batches.next()
            train_step = _compiled_step(run, optimizer, schedule, state, batch)
            batches.seconds_waited()  # for the workers' start: of no window
        metrics = stack.enter_context(_metrics(run, step, evaluated=result is not None))
        traced = run.profile and distributed.is_main()
        profile = stack.enter_context(Profile(run.workdir / "profile", step, total, traced))
        windows = Windows(metrics, step, window)

        while True:
            if step in eval_steps and result is None and not stopped:
                windows.report()
                result = _evaluate(run, eval_step, state, metrics, interruption)
                stopped = result is None
                if result is not None:
                    metrics.evaluation(step, result)
            carried = functools.partial(_progress, windows, state)
            checkpoints.save(step, state, carried, metrics=result, stopping=stopped)
            if stopped or step == total:
                break
            step, result = step + 1, None
            state, step_metrics = profile.step(step, train_step, state, batch)
            windows.report()  # of earlier steps: the devices are busy with this one
            windows.add(step_metrics)
            if step < total:
                batch = batches.next()
            if step % config.train.log_every == 0 or step == total:
                windows.close(batches.seconds_waited())
            stopped = interruption.requested()

    if stopped:
        log.info("stopped after step %d: the same command goes on from there", step)
        return None
    _save_weights(run, state.params if state.ema is None else state.ema)
    best = "top1" if state.ema is None else "ema_top1"
    log.info(
        "test accuracy %.2f%% (%d of %d images) after %d steps in %.0f s",
        100 * result[best],
        round(result[best] * result["images"]),
        result["images"],
        step,
        time.perf_counter() - start,
    )
    return result


class Windows:
    """The metrics of the steps, reported in windows of several.

    A window that is closed is fetched and reported at the next call of `report`, when the devices
    already have another step to do. The window that is open travels in checkpoints: the lines of a
    run do not depend on where it was interrupted.
    """

    def __init__(self, metrics: Metrics, step: int, values: list[dict[str, Any]]):
        """
        Args:
          metrics: to report to.
          step: the number of finished steps.
          values: of the last of them, which were not reported yet (`carried`).
        """
        self._metrics = metrics
        self._step = step
        self._window: list[dict[str, Any]] = values
        self._closed: list[tuple[int, list[dict[str, Any]], float]] = []

    def add(self, step_metrics: dict[str, jax.Array]) -> None:
        """The metrics of the next step, still on the devices."""
        self._step += 1
        self._window.append(step_metrics)

    def close(self, seconds_waited: float) -> None:
        """Ends a window, with the time spent waiting for data in it."""
        self._closed.append((self._step, self._window, seconds_waited))
        self._window = []

    def report(self) -> None:
        """Reports the windows that were closed; raises if a loss is not finite."""
        for step, window, seconds_waited in self._closed:
            values = _fetch(window, step)
            means = {k: sum(v[k] for v in values) / len(values) for k in ("loss", "grad_norm")}
            skipped = sum(value["skipped_images"] for value in values)
            if skipped:
                log.warning("%d corrupt images skipped up to step %d", skipped, step)
            last = values[-1]
            self._metrics.train(
                step,
                means
                | {
                    "learning_rate": last["learning_rate"],
                    "skipped_images": skipped,
                    "data_seconds": seconds_waited,
                },
                last.get("gates", ()),
            )
        self._closed = []

    def carried(self) -> list[dict[str, Any]]:
        """Reports what was closed; gives the metrics of the steps since, to go on with."""
        self.report()
        self._window = _fetch(self._window, self._step)
        return list(self._window)  # a copy: it is written while this one grows


class TrainBatches:
    """The batches of training on the devices, with the time spent waiting for them."""

    def __init__(self, run: startup.Run, start_step: int = 0):
        self._mesh = run.mesh
        self._batches = data.iterate(run.train_chunks, start_step, run.total_steps, run.workers)
        self._waited = 0.0

    def next(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return sharding.put_batch(batch, self._mesh)

    def seconds_waited(self) -> float:
        """Since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        self._batches.close()


def _begin(
    run: startup.Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, list[dict[str, Any]], dict[str, float] | None]:
    """The state to go on from, its window of metrics (`Windows`), its evaluation if it had one."""
    restored = checkpoints.restore(abstract_state(run.model, optimizer, run.config, run.mesh))
    if restored is not None:
        step, state, progress, result = restored
        window = progress["window"]
        log.info("going on from step %d of %s", step, run.workdir)
    else:
        state, window, result = init_state(run.model, optimizer, run.config, run.mesh), [], None
        if run.init_params is not None:
            params = jax.device_put(
                run.init_params, jax.tree.map(lambda x: x.sharding, state.params)
            )
            ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
            state = state.replace(params=params, ema=ema)
        log.info("starting from %s", run.config.init_from or "random weights")
    _describe(run, state)
    if distributed.is_main():
        class_names = run.train_chunks.source.class_names
        workdir.record_start(run.workdir, run.config, int(state.step), class_names)
    return state, window, result


def _progress(windows: Windows, state: TrainState) -> dict[str, Any]:
    """What a checkpoint carries beside the state: metrics that were not reported yet.

    Raises FloatingPointError rather than have a good checkpoint followed by a bad one.
    """
    carried = {"window": windows.carried()}
    if not _all_finite(state):
        raise FloatingPointError(
            f"the weights after step {int(state.step)} are not finite. Try a lower optim.lr or "
            "train.dtype=float32. The checkpoints of earlier steps are kept."
        )
    return carried


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _metrics(run: startup.Run, step: int, evaluated: bool) -> Metrics:
    batch_size = run.config.train.batch_size
    device = run.mesh.devices.flat[0]
    peak = flops.peak_flops(device, run.model.dtype)
    if peak is None and device.platform != "cpu":
        log.info("no MFU: the peak of a %s is not known (convit_jax/flops.py)", device.device_kind)
    return Metrics(
        run.workdir,
        run.total_steps,
        batch_size,
        step,
        evaluated,
        flops_per_step=flops.training_flops(run.model) * batch_size,
        peak_flops=None if peak is None else peak * run.mesh.size,
        main=distributed.is_main(),
    )


def _compiled_step(
    run: startup.Run,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> TrainStep:
    """The step, compiled once for the whole run: another shape would be an error."""
    start = time.perf_counter()
    step = make_train_step(run.model, optimizer, schedule, run.config, run.mesh)
    compiled = step.lower(state, batch).compile()
    log.info("compiled the training step in %.1f s", time.perf_counter() - start)
    return compiled


def _evaluate(
    run: startup.Run,
    eval_step: evaluate.EvalStep,
    state: TrainState,
    metrics: Metrics,
    interruption: Interruption,
) -> dict[str, float] | None:
    """Evaluates the weights, and the averaged weights if there are any under "ema_...".

    None if it was interrupted.
    """

    chunks = run.test_chunks
    params = {"": state.params} if state.ema is None else {"": state.params, "ema_": state.ema}
    with (
        metrics.evaluating(len(chunks) // chunks.share.chunks) as watch,
        contextlib.closing(data.iterate(chunks, workers=run.workers)) as batches,
    ):
        return evaluate.evaluate(
            eval_step,
            params,
            watch(batches),
            run.mesh,
            len(chunks.source),
            interruption.requested,
        )


def _fetch(window: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The metrics of the steps up to `step` as numbers; raises if a loss is not finite."""
    values = [{k: np.asarray(v).tolist() for k, v in m.items()} for m in jax.device_get(window)]
    losses = [value["loss"] for value in values]
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step - len(losses) + i + 1} is {loss}; those before it: "
                f"{losses[max(0, i - 5) : i]}. Try a lower optim.lr or train.dtype=float32. "
                "The checkpoints of earlier steps are kept."
            )
    return values


def _save_weights(run: startup.Run, params: Any) -> None:
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(run.mesh))(params)
    if distributed.is_main():
        path = run.workdir / "weights.safetensors"
        loaded = weights.Loaded(
            run.model,
            jax.device_get(whole),
            str(run.workdir),
            run.train_chunks.source.class_names,
            run.config.data.mean,
            run.config.data.std,
            run.config.augment.eval_crop,
        )
        weights.save_weights(path, loaded)
        log.info("wrote %s", path)


def _describe(run: startup.Run, state: TrainState) -> None:
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    log.info(
        "%s: %s parameters, %s on %s x %s",
        run.config.model.name,
        f"{sum(sizes):,}",
        jnp.dtype(run.model.dtype).name,
        " x ".join(str(n) for n in run.mesh.shape.values() if n > 1) or "1",
        run.mesh.devices.flat[0].device_kind,
    )
    log.info(
        "attention: %s, positional part: %s, remat: %s",
        run.model.attention,
        run.model.positional if run.model.local_up_to_layer else "none",
        run.model.remat,
    )
    log.info(
        "state: %.1f MB a device of %.1f MB",
        sharding.bytes_per_device(state) / 1e6,
        sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
    )
    log.info("training: %s", sources.describe(run.train_chunks.source))
    log.info("test: %s", sources.describe(run.test_chunks.source))
    log.info("%s steps of %d images", f"{run.total_steps:,}", run.config.train.batch_size)
