"""Metrics of training steps, reported in windows of several."""

import logging
import math
from typing import Any

import jax
import numpy as np

from convit_jax.train.metrics import Metrics

log = logging.getLogger(__name__)


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
