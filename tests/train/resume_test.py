"""Runs of main.py that are killed or stopped and started again get the same numbers."""

import json
import shutil
import signal
import time

import pytest
import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = runs.once(tmp_path_factory, "resume_images", runs.write_images)
    return (*runs.SMALL, f"--config.data.source=folder:{folder}")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The working directory of a run that was not interrupted."""

    def train(folder):
        workdir = folder / "run"
        runs.finish(runs.start(workdir, *flags), workdir)
        assert runs.steps_saved(workdir)[-1] == 24

    return runs.once(tmp_path_factory, "resume_whole", train) / "run"


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The working directory of a run that got SIGTERM in its middle."""

    def train(folder):
        workdir = folder / "run"
        process = runs.start(workdir, *flags, "--stopped_status=75")
        runs.wait_for(lambda path: runs.reached(path, 8), process, workdir)
        process.send_signal(signal.SIGTERM)
        runs.finish(process, workdir, code=75)

    return runs.once(tmp_path_factory, "resume_stopped", train) / "run"


def test_killed_runs_end_as_the_one_that_was_not(flags, whole, tmp_path):
    workdir = tmp_path / "run"
    # In the middle of a window of metrics, before the first evaluation.
    process = runs.start(workdir, *flags)
    runs.wait_for(lambda path: runs.reached(path, 4), process, workdir)
    runs.kill(process)
    first = runs.steps_saved(workdir)[-1]

    # While a checkpoint is written.
    for _ in range(5):
        process = runs.start(workdir, *flags)
        runs.wait_for(lambda path: runs.steps_saved(path)[-1] > first, process, workdir)
        runs.wait_for(runs.is_saving, process, workdir, poll=0)
        runs.kill(process)
        if runs.is_saving(workdir):
            break
    assert runs.is_saving(workdir)  # it was caught unfinished
    second = runs.steps_saved(workdir)[-1]
    assert first < second < 24

    # After an evaluation; the run continues with another number of workers.
    process = runs.start(workdir, *flags)
    runs.wait_for(lambda path: runs.steps_saved(path)[-1] > max(second, 12), process, workdir)
    runs.kill(process)
    process = runs.start(workdir, *flags, "--config.data.workers=2")
    runs.finish(process, workdir)

    assert f"continuing from step {second}" in runs.output(workdir)
    assert "changed since the last start: data.workers: saved 1, now 2" in runs.output(workdir)
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert starts[0]["step"] == 0
    assert starts[-1]["step"] > 12
    runs.assert_same(workdir, whole)


def test_sigterm_saves_and_ends_well(stopped, flags, whole, tmp_path):
    output = runs.output(stopped)
    (step,) = runs.steps_saved(stopped)[-1:]
    assert 8 <= step < 24
    assert f"stopped after step {step}: the same command continues from there" in output
    assert "Traceback" not in output
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    runs.finish(runs.start(workdir, *flags), workdir)
    assert f"continuing from step {step}" in runs.output(workdir)
    runs.assert_same(workdir, whole)

    # A finished run: nothing is trained or lost.
    again = runs.start(workdir, *flags, "--stopped_status=75")
    runs.finish(again, workdir)
    assert "24 steps" in runs.output(workdir).splitlines()[-1]
    runs.assert_same(workdir, whole)


def test_goes_on_with_other_devices_and_processes(stopped, flags, whole, tmp_path):
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        shutil.copytree(stopped, workdir)
        runs.finish(runs.start(workdir, *flags, devices=devices), workdir)
        runs.assert_close(workdir, whole)
    pair = tmp_path / "pair"
    shutil.copytree(stopped, pair)
    for process in runs.start_pair(pair, *flags, "--config.mesh.fsdp=4", devices=2):
        runs.finish(process, pair)
    runs.assert_close(pair, whole)


def test_two_processes_are_as_one_and_end_together(flags, whole, tmp_path):
    workdir = tmp_path / "run"
    first, second = runs.start_pair(workdir, *flags)
    runs.wait_for(lambda path: runs.reached(path, 8), first, workdir)
    runs.kill(second)
    start = time.monotonic()
    assert first.wait(timeout=1200) != 0
    print(f"the other process ended after {time.monotonic() - start:.1f} s")
    output = runs.output(workdir)
    assert "process 0 of 2: 4 x cpu, 8 in all" in output
    step = runs.steps_saved(workdir)[-1]
    assert step < 24
    for process in runs.start_pair(workdir, *flags):
        runs.finish(process, workdir)
    assert f"continuing from step {step}" in runs.output(workdir)
    assert runs.output(workdir).count("test accuracy") == 1  # process 0 reports
    runs.assert_close(workdir, whole)
    assert runs.metrics(workdir)[-1]["images"] == 30
