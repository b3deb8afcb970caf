"""Checkpoints of a run, written by Orbax while training continues.

A checkpoint contains the training state and, as JSON, the progress of the training loop. On disk it
is written under a temporary name and renamed when it is complete. In a bucket, the object
commit_success.txt, written last, marks it as complete. A checkpoint that can no longer be read is
renamed, and the one before it is used. A checkpoint can be restored on any number of devices and
processes, and on any mesh.
"""

from collections.abc import Callable, Container, Sequence
import functools
import json
import logging
import math
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from convit_jax import storage
from convit_jax.workdir import checkpoint_errors
from convit_jax.workdir.orbax_paths import for_orbax

log = logging.getLogger(__name__)

# Orbax's name for the folder of metrics in a checkpoint, and for the file in that folder.
_METRICS = ocp.checkpoint_manager.METRIC_ITEM_NAME
# Orbax's name for the object that tells that a checkpoint in a bucket is complete.
_COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE

Progress = dict[str, Any]  # values are JSON types


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      step: number of finished steps.
      state: tree of arrays.
      progress: progress of the training loop.
      metrics: metrics of an evaluation of the state; None if it has not been evaluated.
    """

    step: int
    state: Any
    progress: Progress
    metrics: dict[str, float] | None


def steps_of(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, readable or not, in their order."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.name.isdigit()]
    if storage.is_bucket(folder):  # on disk, an unfinished checkpoint has another name
        paths = [path for path in paths if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in paths)


def newest_step(folder: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint, readable or not; None without a checkpoint."""
    return max(steps_of(folder), default=None)


def best_step(folder: pathlib.Path, metric: str) -> int | None:
    """Returns the step of the checkpoint with the highest metric, the newest of equal ones.

    Returns None if no checkpoint has been evaluated.
    """
    evaluated = {step: read_metrics(folder, step) for step in steps_of(folder)}
    values = {step: _value(metric, metrics) for step, metrics in evaluated.items() if metrics}
    return max(values, key=lambda step: (values[step], step), default=None)


def read_metrics(folder: pathlib.Path, step: int) -> dict[str, float] | None:
    """Returns the metrics of a checkpoint; None if it has none or their file is broken.

    A CheckpointManager would warn that the folder is only read.
    """
    try:
        metrics = json.loads((folder / str(step) / _METRICS / _METRICS).read_bytes())
    except storage.BucketError:
        raise  # whether it has metrics is not known
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) else None


def _value(metric: str, metrics: dict[str, float]) -> float:
    """Returns a metric; -inf where it is missing or NaN, so that it is never the best."""
    value = metrics.get(metric, -math.inf)
    return -math.inf if math.isnan(value) else value


class _Manager(ocp.CheckpointManager):
    """A CheckpointManager that the training loop tells when the process has to stop.

    Orbax's own manager asks JAX's preemption service. That service exists only in runs of several
    processes, and the training loop asks it already: two callers would disturb each other.
    """

    stopping = False

    def reached_preemption(self, step: int) -> bool:
        return self.stopping

    def metrics(self, step: int) -> Any:
        """Returns the metrics of a checkpoint; None if it has none or their file is broken.

        The state of a checkpoint with a broken file of metrics may be intact. It can then be
        evaluated again.
        """
        try:
            return super().metrics(step)
        except ValueError:  # the file is not JSON
            return None


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns a handler that writes each shard of an array from one of the devices that have it.

    By default Orbax splits an array into as many pieces as it has copies, and every copy writes one
    piece. For a state of 1 GB this compiles and runs hundreds of small programs, while training
    waits.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpoints:
    """The checkpoints of a workdir. The end of a `with` block closes them."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every: int,
        also: Container[int],
        keep: int,
        best_by: Sequence[str] = ("top1",),
    ):
        """Opens a folder of checkpoints.

        Args:
          folder: folder of the checkpoints, with one folder for each step; made if missing.
          every: steps between two checkpoints.
          also: further steps at which to save.
          keep: number of newest checkpoints to keep, besides the best.
          best_by: metrics; the checkpoint with the highest value of each is kept.
        """
        values = [functools.partial(_value, metric) for metric in best_by]
        best = [
            checkpoint_managers.BestN(
                get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
            )
            for value in values
        ]
        policies = [
            checkpoint_managers.FixedIntervalPolicy(every),
            checkpoint_managers.SpecificStepsPolicy(also),
            checkpoint_managers.PreemptionCheckpointingPolicy(),
        ]
        checkpoint_errors.hide_late_answers()
        self._folder = folder
        self._unevaluated: int | None = None  # step of the newest checkpoint if it has no metrics
        self._manager = _Manager(
            for_orbax(folder),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.AnySavePolicy(policies),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), *best]
                ),
                best_fn=values[0],
                cleanup_tmp_directories=True,
                # Nothing can be renamed in a bucket: an object tells that a checkpoint is complete.
                temporary_path_class=(
                    ocp.path.atomicity.CommitFileTemporaryPath
                    if storage.is_bucket(folder)
                    else None
                ),
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
            with checkpoint_errors.as_os_error(self._folder):
                self._manager.close()  # waits until the last checkpoint is written
        except OSError:
            if kind is None:
                raise  # otherwise it would hide the error that ended the run

    def save(
        self,
        step: int,
        state: Any,
        progress: Callable[[], Progress],
        metrics: dict[str, float] | None = None,
        stopping: bool = False,
    ) -> bool:
        """Saves a checkpoint if one is due. All processes call this after every step.

        The arrays are copied to the host before this method returns, and are written to disk later.
        If `step` has a checkpoint without metrics, restored or saved, the metrics are added to it.

        Args:
          step: number of finished steps.
          state: tree of arrays.
          progress: returns the progress of the training loop; called only if a checkpoint is due.
          metrics: metrics of an evaluation of this state, or None.
          stopping: whether the process ends after this step.

        Returns:
          Whether a new checkpoint is being written.

        Raises:
          OSError: if this or an earlier checkpoint cannot be written.
        """
        self._manager.stopping = stopping
        with checkpoint_errors.as_os_error(self._folder):
            self._manager.check_for_errors()
            if step == self._unevaluated:
                if metrics is not None:
                    self._add_metrics(step, metrics)
                return False
            if not self._manager.should_save(step):
                return False
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(progress())
            )
            self._unevaluated = step if metrics is None else None
            return self._manager.save(step, args=items, metrics=metrics)

    def restore(self, like: Any) -> Restored | None:
        """Reads the newest checkpoint that is readable; returns None without a checkpoint.

        Newer checkpoints that cannot be read are renamed, so that their steps can be saved again.

        Args:
          like: tree of `jax.ShapeDtypeStruct` with the shardings of the result.

        Raises:
          OSError: if there are checkpoints and none of them can be read. Also on every process, if
            the bucket does not answer one of them.
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
            except Exception as error:  # Orbax raises many types for broken files
                failure = error
            outage = failure and checkpoint_errors.outage(failure, self._folder / str(step))
            if not _on_all(outage is None):  # the checkpoint may be intact
                raise outage or OSError(
                    f"{self._folder / str(step)}: another process cannot read it"
                ) from failure
            if _on_all(restored is not None) and restored is not None:
                for bad in unreadable:
                    self._set_aside(bad)
                self._unevaluated = step if restored.metrics is None else None
                return restored
            log.warning(
                "cannot read checkpoint %s: %s; trying the one before it",
                self._folder / str(step),
                checkpoint_errors.first_line(failure) if failure else "another process cannot",
            )
            unreadable.append(step)
        if unreadable:
            raise OSError(
                f"{self._folder}: none of the checkpoints {sorted(unreadable)} can be read: they "
                "are broken, or of another version of this package. Repair them, continue with "
                "that version, or start anew in another workdir"
            )
        return None

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics to an existing checkpoint, in the file where Orbax expects them."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            path = self._folder / str(step) / _METRICS / _METRICS
            storage.make_folder(path.parent)
            storage.write_text(path, json.dumps(metrics))
        multihost_utils.sync_global_devices("evaluated")
        self._manager.reload()
        self._unevaluated = None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            number = 0
            while (aside := self._folder / f"{step}.unreadable{number or ''}").exists():
                number += 1
            storage.move_folder(self._folder / str(step), aside)
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()


def _on_all(this: bool) -> bool:
    """Returns whether `this` is true on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(this))))
