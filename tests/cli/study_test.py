"""`convit study`."""

from collections.abc import Iterator
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import compiling
import pytest
from runs import ROOT

from convit_jax.cli import study
from convit_jax.workdir.checkpoints import newest_step
from convit_jax.workdir.folder import Workdir

# Two runs of a few seconds each: ConViT and DeiT on half of the images.
SMALL = (
    "sample-efficiency", "--config=digits", "--seeds=1", "--shares=0.5",
    "--config.train.epochs=3", "--config.train.eval_every=3", "--config.model.depth=2",
    "--config.train.probe_images=0",
    "--config.checkpoint.every=2", "--config.model.patch_size=4", "--config.model.embed_dim=8",
    "--config.model.local_up_to_layer=1", "--config.data.workers=0",
)  # fmt: skip
COMMAND = [sys.executable, "-m", "convit_jax", "study", *SMALL]


def test_what_a_study_would_run_is_printed(capsys, tmp_path):
    study.main([*SMALL, f"--out={tmp_path}", "--print"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("convit train --config=digits --config.train.epochs=3 ")
    assert lines[-1].endswith(f"--workdir={tmp_path}/digits/deit-images_0.5-seed_0")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["locality", "--config=digits", "--shares=0.5,1"], "expected one share for locality"),
        (["masking", "--shares=0.5"], "--shares: has no meaning for the study masking"),
        (["ablations", "--layers=2"], "--layers: has no meaning for the study ablations"),
        (["ablations", "--config=deit_s"], "expected a ConViT, got a DeiT"),
        (["ablations", "--config.seed=3"], "seed: set by the study"),
        (["locality", "--layers=9"], "local_up_to_layer"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_run(flags, error, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{error}"):
        study.main([*flags, f"--out={tmp_path}"])
    assert not [*tmp_path.iterdir()]


def test_shares_are_no_percentages(capsys):
    with pytest.raises(SystemExit):
        study.main(["ablations", "--shares=10,100"])
    assert "expected shares up to 1" in capsys.readouterr().err


def test_choices_of_a_file_have_folders_of_their_own(capsys):
    for choice in "bc":
        study.main(["locality", f"--config=ablations:{choice}", "--seeds=1", "--print"])
    folders = {line.split("runs/study/")[1].split("/")[0] for line in
               capsys.readouterr().out.splitlines()}  # fmt: skip
    assert folders == {"ablations_b", "ablations_c"}


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_makes_the_same_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", compiling.flags())  # one device, as a user has
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study.main([*SMALL, f"--out={whole}"])
    # The other study finds its first run finished.
    (killed / "digits").mkdir(parents=True)
    first = "digits/convit-images_0.5-seed_0"
    shutil.copytree(whole / first, killed / first)

    @contextlib.contextmanager
    def begun(line: str) -> Iterator[subprocess.Popen]:
        """Starts a study, and yields its process when it has logged a line."""
        command = [*COMMAND, f"--out={killed}"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert any(line in text for text in process.stderr)
            yield process

    # Killed with its child in the middle of the second run. The next start continues it, and is
    # stopped by a signal.
    second = Workdir(killed / "digits" / "deit-images_0.5-seed_0")
    with begun(": 1 of 1") as process:
        children: list[str] = []
        while not children and process.poll() is None:
            pgrep = ["pgrep", "-P", str(process.pid)]
            children = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
        while (newest_step(second.checkpoints) or 0) < 2:
            assert process.poll() is None, "the study ended"
            time.sleep(0.01)
        for number in (process.pid, *map(int, children)):
            os.kill(number, signal.SIGKILL)
    with begun(": 1 of 1") as process:
        process.terminate()
        assert "the same command continues" in process.stderr.read()
    assert process.returncode == 0

    # A third start finishes. Its table is that of the study that nobody disturbed.
    study.main([*SMALL, f"--out={killed}"])
    log = (killed / "digits" / "deit-images_0.5-seed_0.log").read_text()
    assert "continuing from step" in log
    tables = [(out / "digits" / "sample-efficiency.md").read_text() for out in (whole, killed)]
    assert tables[0] == tables[1]
    assert tables[0].count("|") == 4 * 3
    assert (whole / "digits" / "sample-efficiency.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((whole / "digits" / "sample-efficiency.json").read_text())["cells"]
    assert all(len(cell["top1_percent"]) == 1 for cell in cells)

    # What --print prints is what ran, and --collect makes the table without training.
    capsys.readouterr()
    study.main([*SMALL, f"--out={whole}", "--print"])
    printed = capsys.readouterr().out.splitlines()
    ran = [
        (whole / "digits" / f"{cell['runs'][0]['name']}.log").read_text().splitlines()[0]
        for cell in cells
    ]
    assert printed == ran
    assert "--config.data.sampling_ratio=0.5" in shlex.split(ran[0])
    study.main([*SMALL, f"--out={whole}", "--collect"])
    assert tables[0] in capsys.readouterr().out

    # Runs of another configuration are not taken for those of this one.
    with pytest.raises(SystemExit, match=r"another configuration(.|\n)*train.epochs: saved 3"):
        study.main([*SMALL, f"--out={whole}", "--config.train.epochs=5", "--collect"])
