"""The files that metrics are written to: JSON lines, and TensorBoard's event files.

Both are written at once and not by a thread, so that a full disk is an error where it happens.
(tensorboardX's SummaryWriter has a thread, which dies of it; ten calls later the run waits for a
place in its queue, for ever.)
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import logging
import math
import pathlib
import sys
import time
from types import ModuleType
from typing import Any

from convit_jax import storage
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

Values = Mapping[str, float | Sequence[float]]  # "gates" has one number a GPSA layer

# Shown by TensorBoard under "speed", not under "train".
_SPEED = ("images_per_second", "data_seconds", "data_wait", "mfu")


class JsonLines:
    """metrics.jsonl."""

    def __init__(self, workdir: Workdir, start_step: int, evaluated: bool):
        self._path = workdir.metrics
        with _naming(self._path):
            _remove_lines_after(self._path, start_step, evaluated)
            # Unbuffered: a killed run leaves whole lines, and a failed write leaves nothing that
            # would be tried again on closing.
            self._file = self._path.open("ab", buffering=0)

    def write(self, kind: str, step: int, now: float, metrics: Values) -> None:
        line = {"kind": kind, "step": step, "time": now}
        line |= {name: _json_value(value) for name, value in metrics.items()}
        rest = json.dumps(line, allow_nan=False).encode() + b"\n"
        with _naming(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()


class EventFile:
    """A file for TensorBoard. Every start of a run writes a new one, which goes on with the last.

    https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
    """

    def __init__(self, workdir: Workdir, start_step: int):
        tensorboardX = _import_tensorboardx()
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard reads the files of a folder in the order of their names.
        self._path = workdir.tensorboard / f"events.out.tfevents.{time.time_ns()}"
        with _naming(self._path):
            workdir.tensorboard.mkdir(exist_ok=True)
            self._writer = tensorboardX.RecordWriter(str(self._path))
        # TensorBoard forgets what earlier files have of this step and of those after it.
        first = start_step + 1 if start_step else 0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            self._append(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._append(event_pb2.Event(wall_time=time.time(), step=first, session_log=start))
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def write(self, kind: str, step: int, now: float, metrics: Values) -> None:
        values = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in _tags(kind, metrics)
        ]
        self._append(self._event(wall_time=now, step=step, summary=self._summary(value=values)))

    def _append(self, event: Any) -> None:
        with _naming(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        with _naming(self._path):
            self._writer.close()


def _import_tensorboardx() -> ModuleType:
    """tensorboardX without PyTorch, which it imports where there is one: seconds, for nothing."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an ImportError, which tensorboardX expects
    try:
        import tensorboardX
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX


def _tags(kind: str, metrics: Values) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Sequence):  # the gates
            yield from ((f"gate/layer_{i:02}", float(gate)) for i, gate in enumerate(value, 1))
        else:
            yield f"{'speed' if name in _SPEED else kind}/{name}", float(value)


def _json_value(value: float | Sequence[float]) -> int | float | list | None:
    """A number, or a list of numbers, as JSON has them: without NaN and infinity."""
    if isinstance(value, int):
        return value
    if isinstance(value, Sequence):
        return [_json_value(item) for item in value]
    return float(value) if math.isfinite(value) else None


def _remove_lines_after(path: pathlib.Path, step: int, evaluated: bool) -> None:
    """Removes the lines of steps after `step`, and what is no line, from a file of JSON lines.

    Also that of an evaluation at `step`, unless `evaluated`; all lines, if step is 0. The file is
    replaced by another: it is never seen half-written.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if step and _place_of(line) <= (step, evaluated)]
    if len(kept) == len(lines):
        return
    with storage.whole_file(path) as unfinished:
        unfinished.write_bytes(b"".join(kept))
    log.info("%s: removed %d lines of what came after step %d", path, len(lines) - len(kept), step)


def _place_of(line: bytes) -> tuple[float, bool]:
    """Step, and whether it is of the evaluation after it, to order lines by.

    Of step infinity is what is not a whole line of ours, as a killed run may leave at the end.
    """
    if not line.endswith(b"\n"):
        return math.inf, False
    try:
        values = json.loads(line)
        return int(values["step"]), values["kind"] == "eval"
    except (ValueError, TypeError, KeyError):
        return math.inf, False


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the file's name into errors of writing it, which do not have it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
