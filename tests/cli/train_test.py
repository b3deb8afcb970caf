"""Training from the command line."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import compiling
import pytest
import runs
from runs import ROOT

from convit_jax.cli import main as command

SMALL = (
    "--config.model.patch_size=4",
    "--config.model.embed_dim=8",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.train.epochs=2",
    "--config.train.probe_images=0",
)


def run(*command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": compiling.flags()}  # one device, as a user has
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200
    )


def main(workdir, *flags: str, config: str = "configs/digits.py") -> subprocess.CompletedProcess:
    return run("main.py", f"--config={config}", f"--workdir={workdir}", *flags)


def ended(capsys, *flags: object) -> tuple[int, str]:
    """Trains in this process, which must end; returns the exit status and what was printed."""
    with pytest.raises(SystemExit) as end:
        command.run("train", [str(flag) for flag in flags], "python main.py --mode=train")
    printed = capsys.readouterr()
    if isinstance(end.value.code, int):
        return end.value.code, printed.out + printed.err
    return 1, str(end.value)  # as Python exits with a text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of main.py in a process of its own, and what it printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = main(workdir, *SMALL)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_help_says_how_to_use_it(capsys):
    for flag in ("-h", "--help"):
        code, said = ended(capsys, flag)
        assert code == 0
        for text in ("--config FILE", "--workdir DIR", "--config.train.batch_size=", "convit_ti"):
            assert text in said
    assert "--eval_size SIZES" in run("main.py", "--mode=eval", "--help").stdout


def test_trains_and_ends_with_the_test_accuracy(trained, capsys):
    workdir, done = trained
    lines = done.stderr.splitlines()
    assert re.fullmatch(
        r"test accuracy \d+\.\d\d% \(\d+ of 360 images\) after 22 steps in \d+ s", lines[-1]
    )
    assert any(re.match(r"step 22/22  loss \d\.\d+  img/s \d+  ETA 00:00", line) for line in lines)
    metrics = (workdir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["kind"] == "eval"

    flags = ("--config=digits", f"--workdir={workdir}", *SMALL, "--config.optim.b1=0.5")
    status, said = ended(capsys, *flags)
    assert status == 1
    assert said.startswith("error:")
    assert "choose another --workdir" in said
    assert "optim.b1: saved 0.9, now 0.5" in said


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optm.lr=1", "unknown configuration key: 'optm'\nDid you mean \"optim\""),
        ("--config.train.log_evry=1", "unknown configuration key: 'log_evry'"),
        ("--config.train.epochs=abc", "--config.train.epochs=abc: could not convert"),
        ("--config.model.num_heads=5", "error: num_heads: expected a divisor of embed_dim=64"),
        ("--confg=1", "unrecognized arguments: --confg=1"),
        ("extra", "unrecognized arguments: extra"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, capsys, flag, message):
    status, said = ended(capsys, "--config=digits", f"--workdir={tmp_path / 'run'}", flag)
    assert status == (2 if "unrecognized" in message else 1)
    assert message in said
    assert not (tmp_path / "run").exists()


def test_missing_files_and_flags_are_named(tmp_path, capsys):
    status, said = ended(capsys, "--config=configs/nope.py", f"--workdir={tmp_path}")
    assert status == 1
    assert "configs/nope.py" in said
    status, said = ended(capsys, "--config=digits")
    assert status == 2
    assert "the following arguments are required: --workdir" in said
    status, said = ended(capsys, f"--workdir={tmp_path}")
    assert status == 2
    assert "holds no run to continue" in said
    config = tmp_path / "mine.py"
    config.write_text(
        "from convit_jax import recipe\n"
        "def get_config():\n"
        "    config = recipe.get_config()\n"
        "    config.train.log_evry = 3\n"
        "    return config\n"
    )
    status, said = ended(capsys, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert "unknown key: train.log_evry (did you mean train.log_every?)" in said
    (tmp_path / "file").touch()
    status, said = ended(capsys, "--config=digits", f"--workdir={tmp_path / 'file' / 'run'}")
    assert status == 1
    assert re.search(r"^error: .*Not a directory: .*file", said)


def test_a_run_continues_by_its_own_configuration(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    done = run("main.py", f"--workdir={tmp_path / 'run'}", "--config.train.epochs=3")
    assert done.returncode == 0, done.stderr
    assert "changed since the last start: train.epochs: saved 2.0, now 3.0" in done.stderr
    assert "continuing from step 22 of" in done.stderr
    assert "after 33 steps" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    runs.write_images(tmp_path / "images")
    flags = (*runs.SMALL, f"--config.data.source=folder:{tmp_path / 'images'}")
    process = runs.start(tmp_path / "run", *flags, "--config.train.epochs=400", devices=1)
    runs.wait_for(lambda workdir: "step 8/" in runs.output(workdir), process, tmp_path / "run")
    children = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    started = [int(child) for file in children for child in file.read_text().split()]
    workers = [
        i for i in started if b"spawn_main" in pathlib.Path(f"/proc/{i}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    runs.finish(process, tmp_path / "run", code=1)
    said = runs.output(tmp_path / "run")
    assert said.splitlines()[-1].startswith(
        "error: a worker process that makes batches was ended by SIGKILL, probably because the "
        "memory of the machine or job ran out. Use fewer workers (data.workers) or give"
    )
    assert "Traceback" not in said
    assert "leaked" not in said
