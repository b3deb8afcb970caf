"""The entry points: after an error the process ends, whatever threads and workers are left."""

import gc
import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT

from convit_jax.cli import main
from convit_jax.storage import paths

# A thread and a worker process that would keep Python from exiting, or outlive it.
HANGING = """
import multiprocessing, sys, threading, time
from convit_jax.cli import main

def command():
    threading.Thread(target=threading.Event().wait).start()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid)
    {end}

if __name__ == "__main__":
    main.start(command)
"""


def run(script, end: str) -> subprocess.CompletedProcess:
    script.write_text(HANGING.format(end=end))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit('error: no such file')", 1, "error: no such file\n"),
        ("sys.exit(2)", 2, ""),
        ("raise KeyError('a bug')", 1, "Traceback"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_a_failed_command_ends_the_process_and_its_workers(tmp_path, end, status, said):
    done = run(tmp_path / "script.py", end)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    if end.startswith("sys.exit"):
        assert done.stderr == said
    worker = int(done.stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_every_entry_point_ends_that_way():
    for file in ("main.py", "convit_jax/__main__.py"):
        assert "    start(" in (ROOT / file).read_text()
    assert "convit = convit_jax.cli.main:start\n" in (ROOT / "setup.cfg").read_text()


def test_a_call_inside_a_process_raises():
    with pytest.raises(SystemExit, match="error: no command 'nope'"):
        main.main(["nope"])


def test_a_command_that_succeeds_exits_normally(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended at once"))
    thresholds: list[int] = []
    monkeypatch.setattr(gc, "set_threshold", thresholds.append)
    main.start(lambda: None)
    assert thresholds == [50_000]
    with pytest.raises(SystemExit) as caught:
        main.start(lambda: sys.exit(0))
    assert caught.value.code == 0


def test_every_command_names_the_extra_that_a_bucket_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    paths._load.cache_clear()
    url = "gs://bucket/run"
    for command, *flags in (
        ("train", "--config=configs/digits.py", f"--workdir={url}"),
        ("train", f"--workdir={url}"),
        ("eval", f"--workdir={url}"),
        ("predict", f"--weights={url}", "picture.png"),
        ("convert", url, str(tmp_path / "weights.pth")),
    ):
        with pytest.raises(SystemExit) as ended:
            main.run(command, flags, f"convit {command}")
        assert ended.value.code == (
            "error: gs:// needs the package gcsfs: pip install 'convit-jax[gcs]'"
        ), command
