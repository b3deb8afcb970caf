"""Collects the metrics of training steps and reports them in windows of several steps."""

import logging
import math
from typing import Any

import jax
import numpy as np

from convit_jax.train.metrics import Metrics

log = logging.getLogger(__name__)


class Windows:
    """Collects the metrics of training steps and reports them in windows of several steps.

    A closed window is fetched and reported at the next call of `report`, when the devices already
    work on another step. The open window is stored in checkpoints, so that the reported metrics of
    a run do not depend on where it was interrupted.
    """

    def __init__(self, metrics: Metrics, step: int, values: list[dict[str, Any]]):
        """
        Args:
          metrics: receives the reports.
          step: number of finished steps.
          values: metrics of the last finished steps, if not reported yet; see `carried`.
        """
        self._metrics = metrics
        self._step = step
        self._window: list[dict[str, Any]] = values
        self._closed: list[tuple[int, list[dict[str, Any]], float]] = []

    def add(self, step_metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of the next step, which are still on the devices, to the open window."""
        self._step += 1
        self._window.append(step_metrics)

    def close(self, seconds_waited: float) -> None:
        """Closes the open window; `seconds_waited` is the time spent waiting for data in it."""
        self._closed.append((self._step, self._window, seconds_waited))
        self._window = []

    def report(self) -> None:
        """Reports the closed windows.

        Raises:
          FloatingPointError: if a loss is not finite.
        """
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
        """Reports the closed windows and returns the metrics of the open one, for a checkpoint.

        What is reported is in the files afterwards, also in those of a bucket.
        """
        self.report()
        self._metrics.upload()
        self._window = _fetch(self._window, self._step)
        return list(self._window)  # a copy, since it is written while the window grows


def _fetch(window: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Fetches the metrics of the steps up to `step` as numbers; raises if a loss is not finite."""
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
