"""What a run shows and leaves behind: progress on the terminal, metrics in a file."""

import json
import logging
import pathlib
import sys
import time
from types import TracebackType
from typing import Any

import tqdm

log = logging.getLogger(__name__)


class Metrics:
    """Writes metrics as JSON lines and shows progress: a bar on a terminal, lines elsewhere.

    Attributes of a line: "step", the number of finished steps, "time", seconds since the epoch,
    and the metrics given.
    """

    def __init__(self, path: pathlib.Path, total_steps: int, batch_size: int, start_step: int = 0):
        """
        Args:
          path: of the file; lines are appended.
          total_steps: at which the run ends.
          batch_size: images of a step.
          start_step: at which the run (re)starts.
        """
        self._file = path.open("a", buffering=1)  # a line at a time: a killed run leaves whole ones
        self._batch_size = batch_size
        self._last = (start_step, time.perf_counter())
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            smoothing=0.05,
            disable=not sys.stderr.isatty(),
        )
        self._total = total_steps

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of training up to `step`; adds images_per_second since the last call."""
        (last_step, last_time), now = self._last, time.perf_counter()
        self._last = (step, now)
        rate = (step - last_step) / (now - last_time)
        metrics = metrics | {"images_per_second": rate * self._batch_size}
        self.write("train", step, metrics)
        shown = {"loss": f"{metrics['loss']:.4f}", "img/s": f"{rate * self._batch_size:.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable:
            eta = tqdm.tqdm.format_interval((self._total - step) / rate)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info("step %d/%d  %s  ETA %s", step, self._total, text, eta)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation after `step`; its time does not count in the next rate."""
        self.write("eval", step, metrics)
        shown = f"test top-1 {metrics['top1']:.2%}  loss {metrics['loss']:.4f}"
        if "ema_top1" in metrics:
            shown += f"  averaged weights {metrics['ema_top1']:.2%}"
        with tqdm.tqdm.external_write_mode():
            log.info("step %d/%d  %s", step, self._total, shown)
        self._last = (step, time.perf_counter())

    def write(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        """Appends one line to the file."""
        line = {"kind": kind, "step": step, "time": time.time(), **metrics}
        self._file.write(json.dumps(line) + "\n")
