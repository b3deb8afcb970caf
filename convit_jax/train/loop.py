"""The training loop: runs the steps, evaluates, saves checkpoints and reports metrics."""

import contextlib
import functools
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp

from convit_jax.data.batches.workers import iterate
from convit_jax.data.source import describe
from convit_jax.model import chips, flops
from convit_jax.model.variants import variant_of
from convit_jax.parallel import processes, sharding
from convit_jax.parallel.signals import Interruption
from convit_jax.train import evaluation, same_run
from convit_jax.train.finite import all_finite
from convit_jax.train.metrics import Metrics
from convit_jax.train.probe import Probe
from convit_jax.train.profiling import Profile
from convit_jax.train.setup import Run
from convit_jax.train.step import Batch, TrainState, TrainStep
from convit_jax.train.windows import Windows
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.safetensors import save_weights
from convit_jax.workdir.checkpoints import Checkpoints
from convit_jax.workdir.lock import Lock

log = logging.getLogger(__name__)


def train(run: Run) -> dict[str, float] | None:
    """Trains, evaluates and reports; continues from the newest checkpoint of the run, if any.

    Checkpoints and metrics are written into the working directory. At the end the weights are
    written to `weights.safetensors` there: the averaged weights if the run has any.

    Args:
      run: the run, from `setup.prepare`.

    Returns:
      The results of the last evaluation, see `evaluation.evaluate`. Names of results of the
      averaged weights begin with "ema_". None if the run was interrupted and can be continued.

    Raises:
      FloatingPointError: if a loss or the weights are not finite.
      OSError: if a checkpoint or a metric cannot be written, or another process trains in the
        working directory.
      ImageError: if an image is corrupt or does not fit the configuration.
      RemoteError: if another process of the run cannot take the lock.
    """
    start = time.perf_counter()
    config, total = run.config, run.total_steps
    eval_step = evaluation.make_eval_step(
        run.program.model, config.data.mean, config.data.std, run.program.mesh
    )
    probe = Probe(run)
    eval_every = max(1, round(config.train.eval_every * run.steps_per_epoch))
    log_every = min(config.train.log_every, max(1, int(run.steps_per_epoch)))
    eval_steps = frozenset((*range(eval_every, total, eval_every), total))

    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        if lock := processes.on_all(lambda: Lock(run.workdir) if processes.is_main() else None):
            stack.enter_context(lock)
        folder, options = run.workdir.checkpoints, config.checkpoint.to_dict()
        options["best_by"] = ("ema_top1", "top1") if config.optim.ema_decay else ("top1",)
        checkpoints = stack.enter_context(Checkpoints(folder, also=eval_steps, **options))
        state, window, result = _begin(run, checkpoints)
        step, stopped = int(state.step), False
        if step < total:
            batches = stack.enter_context(contextlib.closing(TrainBatches(run, step)))
            batch = batches.next()
            train_step = _compiled_step(run, state, batch)
            batches.seconds_waited()  # resets: the workers' start is not part of any window
        metrics = stack.enter_context(_metrics(run, step, evaluated=result is not None))
        traced = run.profile and processes.is_main()
        profile = stack.enter_context(Profile(run.workdir.profile, step, total, traced))
        windows = Windows(metrics, step, window)

        while True:
            if lock is not None:
                lock.check()
            carried = functools.partial(_progress, windows, state)
            if step in eval_steps and result is None and not stopped:
                windows.report()
                checkpoints.save(step, state, carried)  # the evaluation may fail
                result = _evaluate(run, eval_step, probe, state, metrics, interruption, lock)
                stopped = result is None
            checkpoints.save(step, state, carried, metrics=result, stopping=stopped)
            if stopped or step == total:
                break
            step, result = step + 1, None
            state, step_metrics = profile.step(step, train_step, state, batch)
            windows.report()  # earlier steps, while the devices are busy with this one
            windows.add(step_metrics)
            if step < total:
                batch = batches.next()
            if step % log_every == 0 or step == total:
                windows.close(batches.seconds_waited())
            stopped = interruption.requested()

    if stopped or result is None:
        log.info("stopped after step %d: the same command continues from there", step)
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


class TrainBatches:
    """Puts the batches of training on the devices and measures the time spent waiting for them."""

    def __init__(self, run: Run, start_step: int = 0):
        self._mesh = run.program.mesh
        self._batches = iterate(run.train_chunks, start_step, run.total_steps, run.workers)
        self._waited = 0.0

    def next(self) -> dict[str, jax.Array]:
        """Returns the next global batch."""
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return sharding.put_batch(batch, self._mesh)

    def seconds_waited(self) -> float:
        """Returns the seconds spent waiting for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()


def _begin(
    run: Run, checkpoints: Checkpoints
) -> tuple[TrainState, list[dict[str, Any]], dict[str, float] | None]:
    """Returns the state to start from, the metrics it carries, and its evaluation, if any."""
    program = run.program
    restored = checkpoints.restore(program.abstract_state)
    if restored is not None:
        step, state, progress, result = restored
        window = progress["window"]
        log.info("continuing from step %d of %s", step, run.workdir)
    else:
        log.info("compiling the initialisation ...")
        state, window, result = program.init_state(), [], None
        if run.init_params is not None:
            params = jax.device_put(run.init_params, program.state_shardings.params)
            ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
            state = state.replace(params=params, ema=ema)
        log.info("starting from %s", run.config.init_from or "random weights")
    _describe(run, state)
    if processes.is_main():
        same_run.record_start(run.workdir, run.config, run.data, int(state.step))
    return state, window, result


def _progress(windows: Windows, state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint stores beside the state: the metrics that are not reported yet.

    Raises:
      FloatingPointError: if the state is not finite, so that it is not saved over good checkpoints.
    """
    carried = {"window": windows.carried()}
    if not all_finite(state):
        raise FloatingPointError(
            f"the weights after step {int(state.step)} are not finite. Try a lower optim.lr or "
            "train.dtype=float32. The checkpoints of earlier steps are kept."
        )
    return carried


def _metrics(run: Run, step: int, evaluated: bool) -> Metrics:
    batch_size = run.config.train.batch_size
    device = run.program.mesh.devices.flat[0]
    peak = chips.peak_flops(device, run.program.model.dtype)
    if peak is None and device.platform != "cpu":
        log.info(
            "no MFU: the peak FLOP/s of a %s is not in convit_jax/model/chips.py",
            device.device_kind,
        )
    return Metrics(
        run.workdir,
        run.total_steps,
        batch_size,
        step,
        evaluated,
        flops_per_step=flops.training_flops(run.program.model) * batch_size,
        peak_flops=None if peak is None else peak * run.program.mesh.size,
        main=processes.is_main(),
    )


def _compiled_step(run: Run, state: TrainState, batch: Batch) -> TrainStep:
    """Compiles the step, once for the whole run; a batch of another shape would be an error."""
    start = time.perf_counter()
    log.info("compiling the training step ...")
    distillation = run.program.distillation
    teacher = () if distillation is None else (distillation.on_devices(),)
    compiled = run.program.jitted_step().lower(state, batch, *teacher).compile()
    log.info("compiled the training step in %.1f s", time.perf_counter() - start)
    return lambda state, batch: compiled(state, batch, *teacher)


def _evaluate(
    run: Run,
    eval_step: evaluation.EvalStep,
    probe: Probe,
    state: TrainState,
    metrics: Metrics,
    interruption: Interruption,
    lock: Lock | None,
) -> dict[str, float] | None:
    """Evaluates the weights and, if there are any, the averaged weights; writes the results.

    Names of results of the averaged weights begin with "ema_". Returns None if the evaluation was
    interrupted. The probe measures the weights that are trained, not the averaged ones.

    Raises:
      OSError: if another run has taken the lock meanwhile; nothing is written then.
    """

    chunks = run.test_chunks
    params = {"": state.params} if state.ema is None else {"": state.params, "ema_": state.ema}
    with (
        metrics.evaluating(len(chunks) // chunks.share.chunks) as watch,
        contextlib.closing(iterate(chunks, workers=run.workers)) as batches,
    ):
        result = evaluation.evaluate(
            eval_step,
            params,
            watch(batches),
            run.program.mesh,
            len(chunks.source),
            interruption.requested,
        )
        if result is not None:
            measured = probe(state.params)
            if lock is not None:
                lock.check()
            metrics.evaluation(int(state.step), result, measured)
        return result


def _save_weights(run: Run, params: Any) -> None:
    mesh, data = run.program.mesh, run.config.data
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
    if processes.is_main():
        loaded = Loaded(
            run.program.model,
            jax.device_get(whole),
            str(run.workdir),
            run.train_chunks.source.class_names,
            data.mean,
            data.std,
            run.config.augment.eval_crop,
        )
        save_weights(run.workdir.weights, loaded)
        log.info("wrote %s", run.workdir.weights)


def _describe(run: Run, state: TrainState) -> None:
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    log.info(
        "%s: %s parameters, %s on %s x %s",
        variant_of(run.program.model) or "none of the paper's models",
        f"{sum(sizes):,}",
        jnp.dtype(run.program.model.dtype).name,
        " x ".join(str(n) for n in run.program.mesh.shape.values() if n > 1) or "1",
        run.program.mesh.devices.flat[0].device_kind,
    )
    log.info(
        "attention: %s, positional part: %s, remat: %s",
        run.program.model.attention,
        run.program.model.positional if run.program.model.local_up_to_layer else "none",
        run.program.model.remat,
    )
    log.info(
        "state: %.1f MB on each device, %.1f MB in all",
        sharding.bytes_per_device(state) / 1e6,
        sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
    )
    log.info("training: %s", describe(run.train_chunks.source))
    log.info("test: %s", describe(run.test_chunks.source))
    log.info("%s steps of %d images", f"{run.total_steps:,}", run.config.train.batch_size)
