"""Checkpoints of a run: Orbax writes them while training goes on, and finds them again.

A checkpoint is the training state and, as JSON, what the loop carries beside it. It is written
under a temporary name and renamed when it is whole; one that can no longer be read is set aside
for the one before it. It fits any number of devices and processes, and any mesh.
"""

from collections.abc import Callable, Container, Iterator
import contextlib
import json
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from convit_jax import storage

log = logging.getLogger(__name__)

_METRICS = ocp.checkpoint_manager.METRIC_ITEM_NAME  # Orbax's folder, and the file in it

Progress = dict[str, Any]  # of JSON's types


class Restored(NamedTuple):
    """What was read from a checkpoint."""

    step: int
    state: Any
    progress: Progress
    metrics: dict[str, float] | None  # of an evaluation of the state; None: it had none yet


def newest_step(folder: pathlib.Path) -> int | None:
    """The step of the newest checkpoint in a folder, readable or not; None if there is none."""
    if not folder.is_dir():
        return None
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)


def best_step(folder: pathlib.Path, metric: str) -> int | None:
    """The step of the checkpoint that was evaluated best; None if none that is there was."""
    if newest_step(folder) is None:
        return None
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[metric], read_only=True, save_interval_steps=0
    )
    with _Manager(folder.resolve(), options=options) as manager:
        evaluated = [step for step in manager.all_steps() if manager.metrics(step)]
        return max(evaluated, key=lambda step: (manager.metrics(step)[metric], step), default=None)


class _Manager(ocp.CheckpointManager):
    """One that is told when the process has to stop.

    Orbax asks JAX's preemption service, which is there in runs of several processes only, and
    which the training loop asks already: two that ask would get in each other's way.
    """

    stopping = False

    def reached_preemption(self, step: int) -> bool:
        return self.stopping

    def metrics(self, step: int) -> Any:
        """None of a broken file too: the state beside it may be whole, and evaluated again."""
        try:
            return super().metrics(step)
        except ValueError:  # no JSON
            return None


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes each array, or each part of a split one, from one of the devices that hold it.

    By default Orbax cuts arrays into as many pieces as there are copies, for all to write a piece:
    hundreds of small programs to compile and to run while training waits, for a state of 1 GB.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpoints:
    """The checkpoints of a working directory; closed by leaving its `with` block."""

    def __init__(self, folder: pathlib.Path, *, every: int, also: Container[int], keep: int):
        """
        Args:
          folder: of the checkpoints, one folder a step; made if missing.
          every: steps between two checkpoints.
          also: further steps to save at.
          keep: how many of the newest stay, besides the best by "top1".
        """

        def top1(metrics: dict[str, float]) -> float:
            return metrics["top1"]

        best = checkpoint_managers.BestN(
            get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [
            checkpoint_managers.FixedIntervalPolicy(every),
            checkpoint_managers.SpecificStepsPolicy(also),
            checkpoint_managers.PreemptionCheckpointingPolicy(),
        ]
        self._folder = folder
        self._unevaluated: int | None = None  # a checkpoint that may get its metrics yet
        self._manager = _Manager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.AnySavePolicy(policies),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), best]
                ),
                best_fn=top1,
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "state": _tree_handler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with _as_os_error(self._folder):
                self._manager.close()  # waits for what is being written
        except OSError:
            if kind is None:
                raise  # else it would hide what ended the run

    def save(
        self,
        step: int,
        state: Any,
        progress: Callable[[], Progress],
        metrics: dict[str, float] | None = None,
        stopping: bool = False,
    ) -> bool:
        """Saves if it is time to; to be called after every step, by all processes.

        The arrays are copied to the host before this returns, and written afterwards. If it is the
        step that was restored, saved before its evaluation was over, its metrics are added.

        Args:
          step: the number of finished steps.
          state: a tree of arrays.
          progress: called if there is to be a checkpoint.
          metrics: of an evaluation of this state.
          stopping: whether the process ends after this step.

        Returns:
          Whether there will be another checkpoint.

        Raises:
          OSError: if this or an earlier checkpoint cannot be written.
        """
        self._manager.stopping = stopping
        with _as_os_error(self._folder):
            self._manager.check_for_errors()
            if step == self._unevaluated and metrics is not None:
                self._add_metrics(step, metrics)
                return False
            if not self._manager.should_save(step):
                return False
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(progress())
            )
            return self._manager.save(step, args=items, metrics=metrics)

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        Those that cannot be read are renamed, so that their steps can be saved again.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with the shardings wanted.

        Raises:
          OSError: if there are checkpoints and none can be read.
        """
        wanted = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
            ),
            progress=ocp.args.JsonRestore(),
        )
        unreadable: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored: Restored | None = None
            failure: Exception | None = None
            try:
                items = self._manager.restore(step, args=wanted)
                metrics = self._manager.metrics(step)
                restored = Restored(step, items["state"], items["progress"], metrics)
            except Exception as error:  # whatever broken files make of the readers
                failure = error
            if _on_all(restored is not None) and restored is not None:
                for bad in unreadable:
                    self._set_aside(bad)
                self._unevaluated = step if restored.metrics is None else None
                return restored
            log.warning(
                "cannot read checkpoint %s: %s; trying the one before it",
                self._folder / str(step),
                str(failure).partition("\n")[0][:300] if failure else "another process cannot",
            )
            unreadable.append(step)
        if unreadable:
            raise OSError(
                f"{self._folder}: none of the checkpoints {sorted(unreadable)} can be read: they "
                "are broken, or of another version of this package. Mend them or go on with that "
                "version, or use another workdir to start anew"
            )
        return None

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """To a checkpoint that is there, where Orbax looks for them; at once, or not at all."""
        if jax.process_index() == 0:
            path = self._folder / str(step) / _METRICS / _METRICS
            path.parent.mkdir(exist_ok=True)
            storage.write_text(path, json.dumps(metrics))
        multihost_utils.sync_global_devices("evaluated")
        self._manager.reload()
        self._unevaluated = None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            number = 0
            while (aside := self._folder / f"{step}.unreadable{number or ''}").exists():
                number += 1
            (self._folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()


def _on_all(this: bool) -> bool:
    """Whether it is so on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(this))))


@contextlib.contextmanager
def _as_os_error(folder: pathlib.Path) -> Iterator[None]:
    """Errors of the file system, which the writer raises as ValueError, as what they are."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(
            f"{folder}: cannot write a checkpoint: {os.strerror(number)}. Those before it are "
            "kept: the same command goes on from the newest"
        ) from error
