"""A trace of a few training steps, for TensorBoard's profiler or Perfetto."""

from collections.abc import Callable
import logging
import pathlib
from types import TracebackType
from typing import Any

import jax

log = logging.getLogger(__name__)

SKIPPED = 10  # steps before the trace: caches and the queue of batches have filled by then
TRACED = 5


class Profile:
    """Runs the steps of training and traces some of them with `jax.profiler`.

        with Profile(workdir / "profile", start_step, total_steps) as profile:
            for step in ...:
                state, metrics = profile.step(step, train_step, state, batch)

    The trace is of what the host does from the first of these steps to the last, the loading of
    batches between them included, and of what the devices do for them.
    """

    def __init__(
        self, folder: pathlib.Path, start_step: int, total_steps: int, enabled: bool = True
    ):
        """
        Args:
          folder: for the trace; made if missing.
          start_step: steps that were finished before.
          total_steps: the number of the last step.
          enabled: False traces nothing. Of several processes, one should.
        """
        self._folder, self._enabled = folder, enabled
        self._last = min(start_step + SKIPPED + TRACED, total_steps)
        self._first = max(start_step + 1, self._last - TRACED + 1)
        self._tracing, self._done = False, start_step

    def step(self, step: int, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), which is the step of this number, counted from 1.

        Raises:
          OSError: if the trace cannot be written.
        """
        if not self._enabled:
            return function(*args)
        if step == self._first:
            jax.block_until_ready(args)  # so that no earlier step is still running
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        self._done = step
        if step == self._last:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # the latter from XLA
            raise OSError(f"the trace could not be written to {self._folder}: {error}") from error
        log.info(
            "wrote a trace of steps %d to %d: look at it with `xprof %s` (pip install xprof), or "
            "open its perfetto_trace.json.gz on https://ui.perfetto.dev",
            self._first,
            self._done,
            self._folder,
        )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracing:  # the run ends early: a trace of what was done
            try:
                self._stop()
            except OSError:
                if error is None:
                    raise
