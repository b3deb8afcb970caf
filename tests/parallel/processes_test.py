"""Processes of one run on this machine: they connect, are refused, are missing or are killed."""

import contextlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from runs import ROOT
from several import finish, free_port, start, start_pair, wait_for

from convit_jax.parallel import launcher, processes

TOGETHER = """
by_hand()
processes.check_devices()
processes._PATIENCE = 0.5
processes.check_shared_folder(sys.argv[3])
try:
    processes.check_shared_folder(sys.argv[3] + f"/of_{jax.process_index()}")
except OSError as error:
    print("refused:", error)
try:
    processes.check_shared_folder("/dev/null/runs")
except OSError as error:
    print("unwritable:", error)
processes.log_from_main()
log.info("an ordinary line")
log.warning("a warning")
print("devices", jax.device_count(), "main", processes.is_main())
print("on this host", processes.on_this_host())
time.sleep(0.5 * jax.process_index())
processes.disconnect()
time.sleep(0.5 * jax.process_index())
os._exit(75)
"""


def test_processes_make_one_run(tmp_path):
    pair = start_pair(TOGETHER, tmp_path / "runs", devices=2)
    first, second = finish(pair)
    assert [process.returncode for process in pair] == [75, 75], first + second
    assert "process 0 of 2: 2 x cpu, 4 in all" in first
    assert "process 1 of 2: 2 x cpu, 4 in all" in second
    assert "devices 4 main True" in first
    assert "devices 4 main False" in second
    assert "on this host 2\n" in first
    assert "on this host 2\n" in second
    folder = tmp_path / "runs" / "of_"
    for text, own in ((first, 0), (second, 1)):
        refused = [line for line in text.splitlines() if line.startswith("refused:")]
        assert refused == [
            f"refused: --workdir: process 1 does not see the folder {folder}{own} of process 0; "
            "it must be on a file system that all hosts share, or a bucket"
        ]
        assert "unwritable: --workdir: process 0 cannot write to /dev/null/runs: " in text
    assert "Not a directory" in first
    assert "an ordinary line\na warning\n" in first
    assert "an ordinary line" not in second
    assert "process 1 of 2: a warning\n" in second
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_different_devices_are_refused_by_all_under_slurm():
    code = """
processes.initialize()
with processes.failing_together():
    processes.check_devices()
"""
    # JAX computes the port from the number of the job.
    job = free_port(start=62000) - (2**16 - 2**12)
    pair = [
        start(
            code,
            devices=1 + process,
            SLURM_JOB_ID=str(job),
            SLURM_STEP_NODELIST="localhost",
            SLURM_STEP_NUM_NODES="1",
            SLURM_STEP_NUM_TASKS="2",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(process),
            SLURM_LOCALID=str(process),
        )
        for process in (0, 1)
    ]
    texts = finish(pair)
    assert [process.returncode for process in pair] == [1, 1], texts
    for process, text in enumerate(texts):
        assert "got 1 x cpu for process 0, 2 x cpu for process 1." in text
        assert (
            f"error: process {process} of 2 stopped. If another process stopped before, its" in text
        )
        assert "Check failure stack trace" not in text  # JAX prints it when its coordinator is gone


def test_process_that_never_comes():
    address = f"127.0.0.1:{free_port()}"
    alone = [start("by_hand(timeout=2)", address, 0)]
    alone.append(start("by_hand(timeout=2)", f"127.0.0.1:{free_port()}", 1))
    stopped = start("print('waiting'); by_hand(timeout=60)", f"127.0.0.1:{free_port()}", 1)
    wait_for(stopped, "waiting")
    time.sleep(1)
    stopped.send_signal(signal.SIGINT)  # Ctrl-C
    with socket.create_server(("::", 0), family=socket.AF_INET6) as taken:
        refused = start("by_hand(timeout=2)", f"127.0.0.1:{taken.getsockname()[1]}", 0)
        first, second, _, port_taken = finish([*alone, stopped, refused])
    assert [process.returncode for process in alone] == [1, 1]
    assert "error: process 0 of 2 waited 2 s for the others. Check that" in first
    assert f"all hosts reach it at {address}." in first
    assert "error: process 1 of 2 waited 2 s for process 0 at 127.0.0.1:" in second
    assert "Check failure stack trace" not in first + second
    assert stopped.returncode == -signal.SIGINT
    # JAX 0.7 does not notice that the port is taken, and waits: the second message.
    assert re.search("OSError: process 0 of 2 cannot use 127|waited 2 s for the oth", port_taken)


def test_killed_process_ends_the_other():
    code = """
by_hand(heartbeat_timeout=3)
with processes.failing_together():
    multihost_utils.process_allgather(np.zeros(()))
    print("ready")
    while True:
        time.sleep(0.01)
        if sys.argv[3] == "talking":
            multihost_utils.process_allgather(np.zeros(()))
"""
    talking, silent = start_pair(code, "talking"), start_pair(code, "silent")
    for pair in (talking, silent):
        wait_for(pair[0], "ready")
        pair[1].kill()
    before = time.monotonic()
    of_talking, _, of_silent, _ = finish([*talking, *silent])
    assert time.monotonic() - before < 300  # JAX would wait as long for them to shut down
    assert talking[0].returncode == 1
    assert "error: process 0 of 2 stopped. If another process stopped before" in of_talking
    # In JAX's own words:
    assert silent[0].returncode == -signal.SIGABRT
    assert "another task died" in of_silent
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\n(/job.*/task:)?1\n", of_silent)


def test_one_process_needs_nothing(tmp_path, caplog):
    processes.initialize()
    assert not jax.distributed.is_initialized()
    processes.check_devices()
    assert processes.is_main()
    assert processes.on_this_host() == 1
    processes.check_shared_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(OSError, match=r"--data: process 0 cannot write to .*: .*Not a directory"):
        processes.check_shared_folder("/dev/null/data", "--data")
    with pytest.raises(KeyError), processes.failing_together():
        raise KeyError
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--coordinator: expected together with --num_processes and"),
        ((None, 2, 0), "--num_processes and --process_id: expected together with --coordinator"),
        (("host:1", None, 0), "--coordinator and --process_id: expected together with"),
        (("host", 2, 0), "--coordinator: expected HOST:PORT, got 'host'"),
        (("host:1", 0, 0), "--num_processes: expected at least 1, got 0"),
        (("host:1", 2, 2), "--process_id: expected 0 to 1, got 2"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*flags)


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_PROCID": "3"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


def test_launchers():
    assert launcher.detect({}) is None
    assert launcher.detect({}, "host:1", 1, 0) is None
    assert launcher.detect(SLURM) == launcher.Launch("slurm", 4, 3)
    # With two tasks a node, a process uses one device. If it has its own GPU, it uses that one.
    packed = {**SLURM, "SLURM_STEP_NUM_NODES": "2"}
    assert not launcher.detect({**packed, "CUDA_VISIBLE_DEVICES": "0,1"}).owns_devices
    assert launcher.detect({**packed, "CUDA_VISIBLE_DEVICES": "1"}).owns_devices
    # A batch script or a shell in an allocation is one process.
    assert launcher.detect({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert launcher.detect({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    # mpirun in a Slurm job starts its daemons by srun.
    both = {**SLURM, **OPEN_MPI}
    assert launcher.detect(both) == launcher.Launch("ompi", 4, 3, owns_devices=False)
    assert launcher.detect({**both, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}).owns_devices
    del both["OMPI_MCA_orte_hnp_uri"]
    with pytest.raises(ValueError, match="--coordinator: expected HOST:PORT, the host of rank 0"):
        launcher.detect(both)
    assert launcher.detect(both, "host:1").coordinator == "host:1"
    assert launcher.detect(both, "host:1", 8, 7) == launcher.Launch("flags", 8, 7, "host:1")


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]):
    """Serves attributes as metadata.google.internal does for a virtual machine of Google Cloud."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            asked_well = self.headers["Metadata-Flavor"] == "Google" and value is not None
            self.send_response(200 if asked_well else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "7", "MPI_LOCALNRANKS": "7", "MPI_LOCALRANKID": "1"}


def test_launchers_of_other_frameworks():
    packed = launcher.Launch("ranks", 4, 3, "first:29500", owns_devices=False, local_device=1)
    assert launcher.detect(TORCHRUN) == packed
    # torchrun listens at the port that it names; others leave it free.
    assert launcher.detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}).coordinator == "first:29501"
    assert launcher.detect(TORCHRUN, "host:1").coordinator == "host:1"
    alone = {**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert launcher.detect(alone) == launcher.Launch("ranks", 4, 3, "first:29500")
    assert launcher.detect({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "1"}).owns_devices
    assert launcher.detect({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert launcher.detect({"WORLD_SIZE": "4"}) is None
    assert launcher.detect({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}).owns_devices


def test_a_launcher_that_tells_too_little_is_refused_with_the_flag_to_use():
    with pytest.raises(ValueError, match=r"--coordinator: .* MPICH .* started 7 processes"):
        launcher.detect(MPICH)
    found = launcher.detect(MPICH, "host:1")
    assert found == launcher.Launch("ranks", 7, 1, "host:1", owns_devices=False, local_device=1)
    assert launcher.detect({**MPICH, "PMI_SIZE": "1", "PMI_RANK": "0"}) is None


def test_torchrun_starts_one_run(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(
        "from convit_jax.parallel import processes\n"
        "processes.initialize()\n"
        "import jax\n"
        "line = f'process {jax.process_index()} of {jax.process_count()}\\n'\n"
        "print(line, end='', flush=True)\n"  # in one piece: both write into one pipe
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            str(script),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["process 0 of 2", "process 1 of 2"]


def test_tpu_hosts():
    pod = launcher.Launch("tpu")
    assert launcher.detect({"TPU_WORKER_HOSTNAMES": "a,b"}) == pod
    assert launcher.detect({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    assert launcher.detect({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert launcher.detect({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert launcher.detect({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}) == pod
    for attributes, expected in (
        ({"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2"}, pod),
        ({"worker-network-endpoints": "x:y:10.0.0.1", "tpu-env": "ZONE: 'z'\n"}, None),
        (
            {
                "worker-network-endpoints": "x:y:10.0.0.1",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
            },
            pod,
        ),
        ({}, None),
    ):
        with metadata_server(attributes) as address:
            assert launcher.detect({"GCE_METADATA_IP": address}) == expected


def test_a_process_that_cannot_look_for_the_folder_tells_the_others(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(f"{path}: the service answered 503")

    monkeypatch.setattr(processes, "_appears", fail)
    with pytest.raises(OSError, match=r"process 0 does not see the folder .*a bucket: .* 503"):
        processes.check_shared_folder(tmp_path)
