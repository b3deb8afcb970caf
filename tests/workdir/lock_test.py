"""The lock of a workdir: held, released, left by a killed process, or by another host."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from runs import ROOT

from convit_jax import storage
from convit_jax.workdir import lock, lock_entry
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.lock import Lock

HOLD = """
import sys, time
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.lock import Lock
with Lock(Workdir(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def quick(monkeypatch):
    """Shortens the times of the lock in a bucket."""
    monkeypatch.setattr(lock, "_SETTLE", 0.0)
    monkeypatch.setattr(lock, "_BEAT", 0.02)
    monkeypatch.setattr(lock, "_WAIT", 0.5)


def entry(**other):
    return json.dumps({"host": "elsewhere", "process": 7, "since": "noon", "beats": 0} | other)


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with Lock(workdir):
        held = json.loads(workdir.lock.read_text())
        with pytest.raises(OSError, match=f"process {held['process']} on host .*since .* trains"):
            Lock(workdir)
        assert json.loads(workdir.lock.read_text()) == held
    Lock(workdir).__exit__()


def test_a_killed_holder_does_not_block(tmp_path, caplog):
    caplog.set_level("INFO")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError, match=f"process {holder.pid} on host"):
        Lock(Workdir(tmp_path))
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert Workdir(tmp_path).lock.stat().st_size  # it could not clean up
    with Lock(Workdir(tmp_path)):
        assert "waiting" not in caplog.text


def test_the_holder_writes_the_lock_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    workdir = Workdir(tmp_path)
    with Lock(workdir) as held:
        while held._beats < 3:
            time.sleep(0.01)
    assert workdir.lock.read_text() == ""


def test_another_hosts_lock_is_taken_over_if_it_is_not_written_anew(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(lock, "_WAIT", 0.2)
    workdir = Workdir(tmp_path)
    workdir.lock.write_text(entry())
    with Lock(workdir):
        assert json.loads(workdir.lock.read_text())["host"] != "elsewhere"
    assert "not released by process 7 on host elsewhere (since noon)" in caplog.text
    assert "taking over" in caplog.text


def test_another_hosts_lock_is_respected_if_it_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_WAIT", 60.0)
    workdir = Workdir(tmp_path)
    workdir.lock.write_text(entry())
    refused = threading.Event()

    def write() -> None:
        beats = 0
        while not refused.wait(0.1):
            beats += 1
            storage.write_text(workdir.lock, entry(beats=beats))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(OSError, match="on host elsewhere"):
        Lock(workdir)
    refused.set()
    writer.join()
    assert json.loads(workdir.lock.read_text())["host"] == "elsewhere"


def test_without_file_locks_the_entry_decides_also_on_one_host(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_entry.fcntl, "flock", unsupported)
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_WAIT", 60.0)
    with Lock(Workdir(tmp_path)), pytest.raises(OSError, match="trains in this folder"):
        Lock(Workdir(tmp_path))


def test_a_bucket_has_one_holder(bucket, quick, caplog):
    caplog.set_level("INFO")
    workdir = Workdir(bucket)
    with Lock(workdir) as held:
        number = held._beats
        with pytest.raises(OSError, match=r"process \d+ on host .*since .* trains in this folder"):
            Lock(workdir)
        assert held._beats > number
        held.check()
        while held._lost is None:  # this process was suspended for a while
            storage.write_text(workdir.lock, entry())
            time.sleep(0.05)
        with pytest.raises(OSError, match=r"process 7 on host elsewhere .* has taken this folder"):
            held.check()
    assert json.loads(workdir.lock.read_text())["host"] == "elsewhere"  # not released by us
    with Lock(workdir):
        assert "not released by process 7 on host elsewhere" in caplog.text
    assert not workdir.lock.exists()


def test_a_killed_holder_does_not_block_a_bucket(gcs, monkeypatch, caplog):
    caplog.set_level("INFO")
    workdir = Workdir(gcs)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, waits in ((ended.pid, False), (os.getpid(), True)):
        found = entry(process=process, kernel=lock._kernel())
        storage.write_text(workdir.lock, found)
        monkeypatch.setattr(lock, "_WAIT", 0.1)
        Lock(workdir).__exit__()
        assert ("waiting" in caplog.text) == waits


def test_of_two_simultaneous_starts_one_gives_way(gcs, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLE", 1.0)
    workdir, results = Workdir(gcs), []

    def start() -> None:
        try:
            results.append(Lock(workdir))
        except OSError as error:
            results.append(error)

    starts = [threading.Thread(target=start) for _ in range(2)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    (held,) = (result for result in results if isinstance(result, Lock))
    held.__exit__()
    (refused,) = (result for result in results if isinstance(result, OSError))
    assert "trains in this folder" in str(refused)
