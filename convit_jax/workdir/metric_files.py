"""Files of metrics: JSON lines, and TensorBoard's event files.

In a bucket, both are uploaded whole now and then, see `storage.GrowingFile`. `upload` does so at
once. Both are written by the caller's thread, so a full disk raises an error in the call that meets
it.
(tensorboardX's SummaryWriter writes in a thread of its own. A full disk ends that thread, and ten
calls later the run waits forever for room in the thread's queue.)
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import logging
import math
import pathlib
import struct
import sys
import time
from types import ModuleType
from typing import Any

from convit_jax import storage
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# A metric is a number, a number for each layer, or for each head of each layer.
Value = float | Sequence[float] | Sequence[Sequence[float]]
Values = Mapping[str, Value]

# What TensorBoard calls the metrics of layers and heads: gate/layer_01, gate/layer_01/head_01.
_LAYERS = {"gates": "gate", "head_gates": "gate", "nonlocality": "nonlocality"}
# Metrics that TensorBoard shows under "speed" instead of "train".
_SPEED = ("images_per_second", "data_seconds", "data_wait", "mfu")


def read_lines(workdir: Workdir) -> list[dict[str, Any]]:
    """Returns the whole lines of metrics.jsonl in their order; none if there is no such file."""
    try:
        lines = storage.read_bytes(workdir.metrics).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if _place_of(line)[0] < math.inf]


class JsonLines:
    """Writer of metrics.jsonl."""

    def __init__(self, workdir: Workdir, start_step: int, evaluated: bool):
        """Opens the file and removes the lines that this start will write again.

        Args:
          workdir: the workdir of the run.
          start_step: number of finished steps.
          evaluated: whether `start_step` has been evaluated, so that its evaluation is kept.

        Raises:
          OSError: if the file cannot be read or written.
        """
        self._path = workdir.metrics
        with _naming(self._path):
            _remove_lines_after(self._path, start_step, evaluated)
            self._file = storage.GrowingFile(self._path)

    def write(self, kind: str, step: int, now: float, metrics: Values) -> None:
        line = {"kind": kind, "step": step, "time": now}
        line |= {name: _json_value(value) for name, value in metrics.items()}
        with _naming(self._path):
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def upload(self) -> None:
        with _naming(self._path):
            self._file.upload()

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()


class EventFile:
    """Writer of a TensorBoard event file. Every start of a run continues in a new file.

    https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
    """

    def __init__(self, workdir: Workdir, start_step: int):
        self._masked_crc32c = _import_tensorboardx().record_writer.masked_crc32c
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard reads the files of a folder in the order of their names.
        self._path = workdir.tensorboard / f"events.out.tfevents.{time.time_ns()}"
        with _naming(self._path):
            storage.make_folder(workdir.tensorboard)
            self._file = storage.GrowingFile(self._path)
        # This event makes TensorBoard drop this step and later steps of earlier files.
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
        """Appends an event as a record of TensorFlow: its length, its bytes, a checksum of each."""
        parts = (struct.pack("<Q", len(data := event.SerializeToString())), data)
        record = (part + struct.pack("<I", self._masked_crc32c(part)) for part in parts)
        with _naming(self._path):
            self._file.write(b"".join(record))

    def upload(self) -> None:
        with _naming(self._path):
            self._file.upload()

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()


def _import_tensorboardx() -> ModuleType:
    """Imports tensorboardX without PyTorch.

    tensorboardX imports PyTorch if it is installed. That takes seconds and is not needed here.
    """
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
        if isinstance(value, Sequence):
            layers: Sequence[Any] = value
            for i, of_layer in enumerate(layers, 1):
                tag = f"{_LAYERS[name]}/layer_{i:02}"
                if isinstance(of_layer, Sequence):
                    yield from ((f"{tag}/head_{h:02}", float(x)) for h, x in enumerate(of_layer, 1))
                else:
                    yield tag, float(of_layer)
        else:
            yield f"{'speed' if name in _SPEED else kind}/{name}", float(value)


def _json_value(value: Value) -> int | float | list | None:
    """Returns a number, or numbers in lists, for JSON, with None in place of NaN and infinity."""
    if isinstance(value, int):
        return value
    if isinstance(value, Sequence):
        return [_json_value(item) for item in value]
    return float(value) if math.isfinite(value) else None


def _remove_lines_after(path: pathlib.Path, step: int, evaluated: bool) -> None:
    """Removes the lines of steps after `step`, and broken lines, from a file of JSON lines.

    Removes the line of an evaluation at `step` too, unless `evaluated`. Removes all lines if `step`
    is 0. A new file replaces the old one, so no reader sees a half-written file.
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
    log.info("%s: removed %d lines written after step %d", path, len(lines) - len(kept), step)


def _place_of(line: bytes) -> tuple[float, bool]:
    """Returns the sort key of a line: (step, is_eval).

    A torn or foreign line sorts last. A killed run may leave a torn line at the end.
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
    """Adds the name of the file to errors of writing it, which lack the name."""
    try:
        yield
    except storage.BucketError:
        raise  # it names the object
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
