"""Shows the progress of a run on the terminal and writes its metrics into files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import logging
import os
import sys
import time
from types import TracebackType
from typing import TypeVar

import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.metric_files import EventFile, JsonLines, Values

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Metrics:
    """Writes the metrics of a run and shows its progress: a bar on a terminal, else log lines.

    A line of `metrics.jsonl` has "kind" ("train" or "eval"), "step" (the number of finished steps),
    "time" (seconds since 1970) and the metrics. A number that is not finite is written as null.
    """

    def __init__(
        self,
        workdir: Workdir,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        evaluated: bool = True,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        main: bool = True,
    ):
        """
        Args:
          workdir: working directory, whose folder must exist. Metrics of steps after `start_step`
            are removed from its files: an earlier start wrote them, and the steps are trained
            again.
          total_steps: step at which the run ends.
          batch_size: number of images of a step, over all processes.
          start_step: step at which the run starts or continues.
          evaluated: whether the state of `start_step` is already evaluated. If not, the metrics of
            its evaluation are removed too.
          flops_per_step: FLOPs that the model needs for a step, see `flops.training_flops`.
          peak_flops: peak FLOPs per second of all devices together.
          main: whether this process writes and shows the metrics; the others do neither.

        Raises:
          OSError: if a file cannot be written, here or in other methods; it names the file.
        """
        self._total, self._start, self._batch_size = total_steps, start_step, batch_size
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._main = main
        self._writers: list[JsonLines | EventFile] = []
        with contextlib.ExitStack() as stack:
            if main:
                self._writers.append(JsonLines(workdir, start_step, evaluated))
                stack.callback(self._writers[-1].close)
                self._writers.append(EventFile(workdir, start_step))
                stack.callback(self._writers[-1].close)
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                miniters=1,
                disable=not (main and shows_bars()),
                # Without tqdm's estimate of the time left, which counts evaluations as training.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
            stack.callback(self._bar.close)
            if not self._bar.disable:
                stack.enter_context(logging_redirect_tqdm())  # prints log lines above the bar
            self._open = stack.pop_all()
        self._step, self._mark = start_step, time.perf_counter()
        self._training_seconds = self._paused = 0.0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def train(self, step: int, metrics: Mapping[str, float], gates: Sequence[float] = ()) -> None:
        """Writes and shows the metrics of training for the steps since the last call.

        Three metrics are added, for the time since the last call without evaluations. They are
        "images_per_second"; "mfu", the share of the devices' peak FLOPs per second, if both FLOPs
        are known; and "data_wait", the share of the time spent waiting for data, if `metrics` has
        "data_seconds".

        Args:
          step: number of finished steps, more than at the last call.
          metrics: "loss" and others.
          gates: for each GPSA layer, the mean over the heads of sigmoid(gate).
        """
        now = time.perf_counter()
        seconds = now - self._mark - self._paused
        steps = step - self._step
        self._step, self._mark, self._paused = step, now, 0.0
        self._training_seconds += seconds

        rate = steps / seconds
        added: dict[str, float | Sequence[float]] = {"images_per_second": rate * self._batch_size}
        if "data_seconds" in metrics:
            added["data_wait"] = min(1.0, metrics["data_seconds"] / seconds)
        if self._flops_per_step and self._peak_flops:
            added["mfu"] = rate * self._flops_per_step / self._peak_flops
        if len(gates):
            added["gates"] = [float(gate) for gate in gates]
        shown: Values = {**metrics, **added}
        self.write("train", step, shown)
        self._show(step, shown)

    def _show(self, step: int, metrics: Values) -> None:
        left = (self._total - step) * self._training_seconds / (step - self._start)
        shown = [
            f"loss {metrics['loss']:.4f}",
            f"img/s {metrics['images_per_second']:.0f}",
            f"ETA {tqdm.tqdm.format_interval(left)}",
        ]
        if "data_wait" in metrics:
            shown.append(f"data wait {metrics['data_wait']:.0%}")
        if "mfu" in metrics:
            shown.append(f"MFU {metrics['mfu']:.1%}")
        self._bar.set_postfix_str("  ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)
        if self._main and self._bar.disable:
            log.info("step %d/%d  %s", step, self._total, "  ".join(shown))

    @contextlib.contextmanager
    def evaluating(self, batches: int) -> Iterator[Callable[[Iterable[Item]], Iterator[Item]]]:
        """Shows the progress of an evaluation, and leaves its time out of the training rates.

            with metrics.evaluating(len(batches)) as watch:
                result = evaluate(..., watch(batches))

        Args:
          batches: number of batches of the evaluation.

        Yields:
          A function that wraps an iterable of batches and moves the bar with each batch.
        """
        start = time.perf_counter()
        bar = tqdm.tqdm(
            desc="evaluation", total=batches, unit="batch", leave=False, disable=self._bar.disable
        )

        def watch(iterable: Iterable[Item]) -> Iterator[Item]:
            for item in iterable:
                yield item
                bar.update()

        try:
            yield watch
        finally:
            bar.close()
            self._paused += time.perf_counter() - start

    def evaluation(
        self, step: int, metrics: Mapping[str, float], measured: Values | None = None
    ) -> None:
        """Writes and shows the metrics of an evaluation after `step`.

        Args:
          step: number of finished steps.
          metrics: "top1", "loss", "ema_top1" (if there are averaged weights) and others.
          measured: what a `Probe` measured; written, and not shown.
        """
        self.write("eval", step, {**metrics, **(measured or {})})
        self.upload()  # before the checkpoint is marked as evaluated
        shown = f"test top-1 {metrics['top1']:.2%}  loss {metrics['loss']:.4f}"
        if "ema_top1" in metrics:
            shown += f"  averaged weights {metrics['ema_top1']:.2%}"
        if self._main:
            log.info("step %d/%d  %s", step, self._total, shown)

    def write(self, kind: str, step: int, metrics: Values) -> None:
        """Appends metrics to the files."""
        now = time.time()
        for writer in self._writers:
            writer.write(kind, step, now, metrics)

    def upload(self) -> None:
        """Uploads what the files in a bucket lack; does nothing on disk.

        A checkpoint must not be saved before: the run would continue after metrics that are lost.
        """
        for writer in self._writers:
            writer.upload()


def shows_bars() -> bool:
    """Returns whether standard error is a terminal of known width, which can show a bar."""
    if not sys.stderr.isatty():
        return False
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) > 0
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream without a file, or a terminal without a size
        return False
