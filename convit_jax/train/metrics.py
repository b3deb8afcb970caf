"""What a run shows and leaves behind: progress on the terminal, metrics in files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import logging
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
    """Writes the metrics of a run and shows its progress: a bar on a terminal, lines elsewhere.

    A line of `metrics.jsonl` has "kind" ("train" or "eval"), "step", the number of finished steps,
    "time", seconds since the epoch, and the metrics given; null is a number that is not finite.
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
          workdir: its folder exists. Where an earlier run was killed, what it wrote there of
            steps after `start_step` is removed: they are trained again.
          total_steps: at which the run ends.
          batch_size: images of a step, on all processes together.
          start_step: at which the run (re)starts.
          evaluated: whether the state of that step was; if not, what was written of it goes too.
          flops_per_step: that the model needs for a step, see `flops.training_flops`.
          peak_flops: that all devices together can do in a second.
          main: whether this process is the one that writes and shows; the others do neither.

        Raises:
          OSError: if a file cannot be written, here or later; it names the file.
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
                disable=not (main and sys.stderr.isatty()),
                # Without tqdm's own estimate, which counts the time of evaluations as training.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
            stack.callback(self._bar.close)
            if not self._bar.disable:
                stack.enter_context(logging_redirect_tqdm())  # messages go above the bar
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
        """Metrics of training up to `step`, which is past that of the last call.

        Adds, for the time since then without evaluations, "images_per_second"; "mfu", the share
        of the devices' peak, if both FLOPs are known; and "data_wait", the share of the time that
        was "data_seconds", if that is among the metrics.

        Args:
          step: the number of finished steps.
          metrics: "loss" and others.
          gates: mean over the heads of the gates of each GPSA layer, after the sigmoid.
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
        metrics = {**metrics, **added}
        self.write("train", step, metrics)
        self._show(step, metrics)

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
        """Shows the progress of an evaluation, whose time counts in no rate.

            with metrics.evaluating(len(batches)) as watch:
                result = evaluate(..., watch(batches))

        Args:
          batches: how many there will be, of all the iterables watched.

        Yields:
          A function from an iterable to an iterator over the same, which moves the bar.
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

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation after `step`: "top1", "loss", "ema_top1" and others."""
        self.write("eval", step, metrics)
        shown = f"test top-1 {metrics['top1']:.2%}  loss {metrics['loss']:.4f}"
        if "ema_top1" in metrics:
            shown += f"  averaged weights {metrics['ema_top1']:.2%}"
        if self._main:
            log.info("step %d/%d  %s", step, self._total, shown)

    def write(self, kind: str, step: int, metrics: Values) -> None:
        """Appends metrics to the files; "gates" is a list, every other one a number."""
        now = time.time()
        for writer in self._writers:
            writer.write(kind, step, now, metrics)
