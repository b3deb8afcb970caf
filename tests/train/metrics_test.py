"""Metrics in files and on the terminal: rates, restarts, failing disks."""

import contextlib
import errno
import io
import json
import logging
import os
import pty
import resource
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from convit_jax.data.tfds import records
from convit_jax.storage import growing
from convit_jax.train.metrics import Metrics
from convit_jax.workdir.folder import Workdir


def json_lines(workdir):
    def refuse(constant):
        raise ValueError(f"not JSON: {constant}")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def event_files(workdir):
    """The events of each of TensorBoard's files, checksums checked."""
    return [
        list(read_events(path.read_bytes()))
        for path in sorted((workdir / "tensorboard").glob("*tfevents*"))
    ]


def read_events(data):
    def take(size):
        nonlocal data
        taken, data = data[:size], data[size:]
        checksum, data = data[:4], data[4:]
        assert records.masked_crc32c(taken) == int.from_bytes(checksum, "little")
        return taken

    while data:
        length = int.from_bytes(take(8), "little")
        yield event_pb2.Event.FromString(take(length))


def scalars(event):
    return {value.tag: value.simple_value for value in event.summary.value}


@pytest.fixture
def clock(monkeypatch):
    """A perf_counter that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_files_hold_what_was_measured(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO)
    options = {"flops_per_step": 2e9, "peak_flops": 1e11}
    with Metrics(Workdir(tmp_path), 40, batch_size=64, start_step=10, **options) as metrics:
        clock[0] += 2.0
        first = {"loss": 1.5, "learning_rate": 0.1, "data_seconds": 0.5}
        metrics.train(20, first, gates=np.array([0.75, 0.5], np.float32))
        clock[0] += 1.0
        with metrics.evaluating(2) as watch:
            assert list(watch(iter("ab"))) == ["a", "b"]
            clock[0] += 1000.0
        metrics.evaluation(25, {"top1": 0.25, "loss": 2.0, "images": 9, "ema_top1": 0.5})
        clock[0] += 3.0
        metrics.train(30, {"loss": 1.25, "data_seconds": 5.0})  # partly before the last call
        clock[0] += 2.0
        metrics.train(40, {"loss": 1.125, "data_seconds": 0.0})

    train, evaluation, last, end = json_lines(tmp_path)
    assert abs(time.time() - train.pop("time")) < 60
    assert train == {
        "kind": "train", "step": 20, **first, "images_per_second": 320.0, "data_wait": 0.25,
        "mfu": 0.1, "gates": [0.75, 0.5],
    }  # fmt: skip
    assert evaluation["kind"] == "eval"
    assert evaluation["images"] == 9
    assert (last["images_per_second"], last["data_wait"], last["mfu"]) == (160.0, 1.0, 0.05)
    assert end["images_per_second"] == 320.0

    assert caplog.messages == [
        "step 20/40  loss 1.5000  img/s 320  ETA 00:04  data wait 25%  MFU 10.0%",
        "step 25/40  test top-1 25.00%  loss 2.0000  averaged weights 50.00%",
        "step 30/40  loss 1.2500  img/s 160  ETA 00:03  data wait 100%  MFU 5.0%",
        "step 40/40  loss 1.1250  img/s 320  ETA 00:00  data wait 0%  MFU 10.0%",
    ]

    ((version, start, *events),) = event_files(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (event_pb2.SessionLog.START, 11)
    assert [event.step for event in events] == [20, 25, 30, 40]
    assert events[1].wall_time == evaluation["time"]
    assert scalars(events[0]) == pytest.approx({
        "train/loss": 1.5, "train/learning_rate": 0.1, "speed/data_seconds": 0.5,
        "speed/images_per_second": 320.0, "speed/data_wait": 0.25, "speed/mfu": 0.1,
        "gate/layer_01": 0.75, "gate/layer_02": 0.5,
    })  # fmt: skip
    assert scalars(events[1])["eval/top1"] == 0.25


def test_without_a_known_peak_there_is_no_mfu(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Metrics(Workdir(tmp_path), 10, 64, flops_per_step=1e9) as metrics:
        metrics.train(5, {"loss": 1.0})
    (line,) = json_lines(tmp_path)
    assert line.keys() == {"kind", "step", "time", "loss", "images_per_second"}
    assert "MFU" not in caplog.text


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Metrics(Workdir(tmp_path), 10, 64) as metrics:
        values = {"loss": float("nan"), "top1": np.float32(0.5), "top5": -np.inf, "images": 3}
        metrics.write("eval", 1, {**values, "gates": [np.nan, 0.5]})
    (line,) = json_lines(tmp_path)
    assert line["loss"] is line["top5"] is None
    assert (line["top1"], line["images"], line["gates"]) == (0.5, 3, [None, 0.5])
    values = scalars(event_files(tmp_path)[0][-1])
    assert np.isnan(values["eval/loss"])
    assert values["eval/top5"] == -np.inf


def write_steps(workdir, start_step, steps, loss):
    with Metrics(Workdir(workdir), 100, 64, start_step) as metrics:
        for step in steps:
            metrics.train(step, {"loss": loss})


def test_a_restart_removes_what_is_trained_again(tmp_path, caplog):
    """The run was killed at step 45, while it wrote a line; its last checkpoint is of step 20."""
    caplog.set_level(logging.INFO)
    with Metrics(Workdir(tmp_path), 100, 64) as metrics:
        metrics.write("eval", 0, {"loss": 0.0})
        for step in (10, 20, 30, 40):
            metrics.train(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\0\0\n[5]\n" + b'{"kind": "train", "step": 20}')
    write_steps(tmp_path, 20, (30, 40), loss=2.0)
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == [
        (0, 0.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0),
    ]  # fmt: skip
    assert f"{path}: removed 5 lines written after step 20" in caplog.messages
    # TensorBoard ignores events of earlier files from the step at which the last file starts.
    assert [file[1].step for file in event_files(tmp_path)] == [0, 21]

    # A run that continues from its last line keeps all lines.
    before = path.stat().st_ino
    write_steps(tmp_path, 40, (50,), loss=3.0)
    assert path.stat().st_ino == before
    assert [line["step"] for line in json_lines(tmp_path)] == [0, 10, 20, 30, 40, 50]

    # A run that was killed before its first checkpoint starts anew.
    write_steps(tmp_path, 0, (10,), loss=4.0)
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path)] == [(10, 4.0)]
    assert [file[1].step for file in event_files(tmp_path)] == [0, 21, 41, 0]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_restart_removes_an_evaluation_that_is_done_again(tmp_path):
    """The run was killed when the line was written but the checkpoint was not updated."""
    write_steps(tmp_path, 0, (40,), loss=1.0)
    with Metrics(Workdir(tmp_path), 100, 64, 40) as metrics:
        metrics.write("eval", 40, {"loss": 3.0})
    for evaluated, kinds in ((True, ["train", "eval"]), (False, ["train"])):
        with Metrics(Workdir(tmp_path), 100, 64, 40, evaluated=evaluated):
            assert [line["kind"] for line in json_lines(tmp_path)] == kinds


@contextlib.contextmanager
def files_of_at_most(size):
    """Makes the system refuse to let any file of this process grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("gates", "file"),
    # Gates make the line of JSON longer than the event; short numbers make the event longer.
    [([1 / 3] * 20, r"metrics\.jsonl"), ((), r"tensorboard/events\.out\.tfevents\.\d+")],
)
def test_a_failing_write_ends_the_run_and_names_the_file(tmp_path, gates, file):
    short = {} if gates else {f"metric{i}": 0 for i in range(30)}
    done = 0

    def run():
        nonlocal done
        with files_of_at_most(4096), Metrics(Workdir(tmp_path), 1000, 64) as metrics:
            while done < 1000:
                metrics.train(done + 1, {"loss": 1.0, **short}, gates)
                done += 1

    with pytest.raises(OSError, match=rf"\[Errno {errno.EFBIG}\] .*: '{tmp_path}/{file}'"):
        run()
    assert done > 3
    # After a restart with enough room, the rest of the broken last line does no harm.
    write_steps(tmp_path, done, (done + 1,), loss=2.0)
    assert [line["step"] for line in json_lines(tmp_path)] == list(range(1, done + 2))


def test_the_old_lines_stay_where_there_is_no_room_for_the_new_file(tmp_path):
    write_steps(tmp_path, 0, range(1, 40), loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        files_of_at_most(1024),
        pytest.raises(OSError, match=r"metrics\.jsonl'"),
    ):
        Metrics(Workdir(tmp_path), 100, 64, start_step=30)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/metrics\.jsonl'"):
        Metrics(Workdir(tmp_path / "none"), 10, 64)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_the_main_process_writes_and_shows(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    with Metrics(Workdir(tmp_path), 10, 64, main=False) as metrics:
        metrics.train(5, {"loss": 1.0})
        with metrics.evaluating(2) as watch:
            assert list(watch("ab")) == ["a", "b"]
        metrics.evaluation(5, {"top1": 0.5, "loss": 1.0})
    assert os.listdir(tmp_path) == []
    assert sys.stderr.getvalue() == caplog.text == ""


def test_a_terminal_of_unknown_width_gets_lines(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("COLUMNS", raising=False)
    controller, end = pty.openpty()  # its width is 0, as in some containers
    with open(end, "w") as terminal, open(controller, "rb"):
        monkeypatch.setattr(sys, "stderr", terminal)
        with Metrics(Workdir(tmp_path), 10, 64) as metrics:
            metrics.train(5, {"loss": 1.0})
    assert "step 5/10  loss 1.0000" in caplog.text


def test_a_terminal_gets_bars(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.INFO)
    with Metrics(Workdir(tmp_path), 40, 64, start_step=10) as metrics:
        time.sleep(0.11)  # tqdm draws ten times a second
        metrics.train(20, {"loss": 1.5, "data_seconds": 0.0})
        with metrics.evaluating(3) as watch:
            for _ in watch("abc"):
                time.sleep(0.11)
        metrics.evaluation(20, {"top1": 0.25, "loss": 2.0})
        time.sleep(0.11)
        metrics.train(40, {"loss": 1.25, "data_seconds": 0.0})
    drawn = terminal.getvalue().replace("\n", "\r").split("\r")
    bars = [text for text in drawn if "| 20/40 [00:00, loss 1.5000  img/s " in text]
    assert bars
    assert "ETA 00:00  data wait 0%]" in bars[0]
    assert any(text.startswith("evaluation:  67%|") and " 2/3 " in text for text in drawn)
    # The message has its own line, with the bar redrawn below it; there are no lines of training.
    assert "step 20/40  test top-1 25.00%  loss 2.0000" in drawn
    assert not any(text.startswith("step 40/40") for text in drawn)
    assert drawn[-2].startswith("100%|")
    assert "| 40/40 [" in drawn[-2]
    assert root.handlers == [handler]


def test_files_in_a_bucket_are_written_whole_before_a_checkpoint(bucket, monkeypatch):
    workdir = Workdir(bucket)
    with Metrics(workdir, 100, 64) as metrics:
        metrics.train(10, {"loss": 1.0})
        assert not workdir.metrics.exists()
        metrics.upload()  # a checkpoint of step 10 follows
        metrics.train(20, {"loss": 1.0})
        assert [line["step"] for line in json_lines(workdir.path)] == [10]
        monkeypatch.setattr(growing, "_UPLOAD_EVERY", -1.0)  # a minute has passed
        metrics.train(30, {"loss": 1.0})
        assert [line["step"] for line in json_lines(workdir.path)] == [10, 20, 30]
    monkeypatch.undo()
    with Metrics(workdir, 100, 64, start_step=10) as metrics:
        assert [line["step"] for line in json_lines(workdir.path)] == [10]
        metrics.evaluation(10, {"top1": 0.5, "loss": 2.0})
        assert [line["kind"] for line in json_lines(workdir.path)] == ["train", "eval"]
    first, second = event_files(workdir.path)
    assert [event.step for event in first[2:]] == [10, 20, 30]
    assert [event.step for event in second[1:]] == [11, 10]
