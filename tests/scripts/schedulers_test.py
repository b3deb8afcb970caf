"""scripts/ for Slurm and Kubernetes: what they start is what convit understands."""

import math
import os
import subprocess

import pytest
from runs import ROOT
import yaml

from convit_jax.cli import options, train
from convit_jax.parallel import launcher

FLAGS = ("--config=convit_b", "--config.data.dir=/my data", "--workdir=/runs/b")


def test_slurm_starts_one_process_a_node_and_requeues_a_run_that_is_not_finished(tmp_path):
    script = ROOT / "scripts" / "slurm.sh"
    for name, code in (
        ("srun", 'exit "$SRUN_STATUS"'),
        ("squeue", 'echo "$STATE"'),
        ("scontrol", ""),
    ):
        line = f'#!/bin/sh\nprintf "%s|" {name} "$@" >>{tmp_path}/calls\necho >>{tmp_path}/calls\n'
        (tmp_path / name).write_text(line + code)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    for status, state in ((0, "RUNNING"), (75, "RUNNING"), (75, "COMPLETING"), (1, "RUNNING")):
        given = {"SRUN_STATUS": str(status), "STATE": state}
        assert subprocess.run(["bash", script, *FLAGS], env=env | given).returncode == status
    step = ("srun", "--kill-on-bad-exit=0", "--cpus-per-task=64", "convit", "train")
    started = "|".join((*step, "--stopped_status=75", *FLAGS, ""))
    calls = (tmp_path / "calls").read_text().splitlines()
    calls = [call for call in calls if not call.startswith("squeue")]
    assert calls == [started, started, "scontrol|requeue|7|", started, started]

    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    given = dict(line.removeprefix("#SBATCH --").split("=") for line in directives if "=" in line)
    assert "#SBATCH --requeue" in directives
    assert (given["nodes"], given["ntasks-per-node"], given["gpus-per-node"]) == ("4", "1", "8")
    assert given["signal"] == "USR1@300"  # no B: before it, which would signal this script alone
    assert given["open-mode"] == "append"


def test_an_exit_status_has_eight_bits(capsys):
    with pytest.raises(SystemExit):
        train.main(["--workdir=runs", "--stopped_status=256"])
    assert "--stopped_status: expected at most 255, got 256" in capsys.readouterr().err


@pytest.fixture(params=["gke_tpu.yaml", "kubernetes_gpu.yaml"])
def jobset(request):
    return yaml.safe_load((ROOT / "scripts" / request.param).read_text())


def test_kubernetes_starts_processes_that_find_each_other(jobset, monkeypatch, capsys):
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    assert spec["backoffLimit"] == 0  # the whole JobSet starts again, not a pod alone
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60  # the default is 30
    (container,) = pod["containers"]
    assert container["command"][:2] == ["convit", "train"]
    assert "--stopped_status=75" in container["command"]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"]

    given = dict(flag.split("=", 1) for flag in container["command"][2:])
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in given if not flag.startswith("--config."))
    overrides = [f"{flag}={value}" for flag, value in given.items() if flag.startswith("--config.")]
    config = options.configuration(given["--config"], overrides)
    assert config.data.dir == "gs://BUCKET/data"

    if "google.com/tpu" in resources["limits"]:
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = int(resources["limits"]["google.com/tpu"]) * spec["completions"]
        assert math.prod(map(int, topology.split("x"))) == chips
        hosts = ",".join(f"convit-host-0-{i}.convit" for i in range(4))
        found = launcher.detect({"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": hosts})
        assert found == launcher.Launch("tpu")
        return
    assert resources["limits"]["nvidia.com/gpu"] == "8"
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert given["--coordinator"] == f"{name}-{job['name']}-0-0.{name}:{port}"
    assert given["--process_id"] == "$(JOB_COMPLETION_INDEX)"
    launch = launcher.detect({}, given["--coordinator"], int(given["--num_processes"]), 3)
    assert launch.num_processes == spec["completions"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
    assert volume["emptyDir"]["medium"] == "Memory"
