"""Traces a few training steps for TensorBoard's profiler or Perfetto."""

from collections.abc import Callable
import contextlib
import logging
import pathlib
from types import TracebackType
from typing import Any

import jax

from convit_jax import storage

log = logging.getLogger(__name__)

SKIPPED = 10  # steps before the trace, in which caches and the queue of batches fill
TRACED = 5  # steps in the trace


class Profile:
    """Runs the steps of training and traces some of them with `jax.profiler`.

        with Profile(workdir / "profile", start_step, total_steps) as profile:
            for step in ...:
                state, metrics = profile.step(step, train_step, state, batch)

    The trace shows what the devices do for the traced steps, and what the host does from the first
    traced step to the last, including the loading of batches.
    """

    def __init__(
        self, folder: pathlib.Path, start_step: int, total_steps: int, enabled: bool = True
    ):
        """
        Args:
          folder: folder for the trace, on disk or in a bucket; made if missing.
          start_step: number of steps that were finished before.
          total_steps: number of the last step.
          enabled: whether to trace. Of several processes, only one should.
        """
        self._folder, self._enabled = folder, enabled
        self._last = min(start_step + SKIPPED + TRACED, total_steps)
        self._first = max(start_step + 1, self._last - TRACED + 1)
        self._tracing, self._done = False, start_step
        self._open = contextlib.ExitStack()  # closed when the trace is written

    def step(self, step: int, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a step, and traces it if it is one of the steps to trace; returns function(*args).

        Args:
          step: number of this step, from 1.
          function: the training step.
          *args: arguments of the training step.

        Raises:
          OSError: if the trace cannot be written.
        """
        if not self._enabled:
            return function(*args)
        if step == self._first:
            jax.block_until_ready(args)  # so that no earlier step is still running
            written = self._open.enter_context(storage.local_folder(self._folder))
            jax.profiler.start_trace(str(written), create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        self._done = step
        if step == self._last:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        """Ends the trace and writes it."""
        self._tracing = False
        try:
            with self._open:
                jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # XLA raises RuntimeError
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
        if self._tracing:  # the run ends early: write the trace up to here
            try:
                self._stop()
            except OSError:
                if error is None:
                    raise
