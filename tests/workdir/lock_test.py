"""The lock of a workdir: held, released, left by a killed process, or by another host."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

from faulty_proxy import LOST, first
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
    monkeypatch.setattr(lock, "_WAIT", 60.0)  # over at once where a holder still writes


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


def test_a_bucket_has_one_holder(bucket, quick, caplog, monkeypatch):
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
    monkeypatch.setattr(lock, "_WAIT", 0.1)
    with Lock(workdir):
        assert "not released by process 7 on host elsewhere" in caplog.text
    assert not workdir.lock.exists()


def test_a_killed_holder_does_not_block_a_bucket(gcs, quick, monkeypatch, caplog):
    caplog.set_level("INFO")
    workdir = Workdir(gcs)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(lock, "_WAIT", 0.1)
    for process, waits in ((ended.pid, False), (os.getpid(), True)):
        found = entry(process=process, kernel=lock._kernel())
        storage.write_text(workdir.lock, found)
        Lock(workdir).__exit__()
        assert ("waiting" in caplog.text) == waits


def test_of_two_simultaneous_starts_one_gives_way(bucket, quick, monkeypatch):
    workdir, held = Workdir(bucket), []
    read = lock_entry.ObjectEntry.read

    def read_slowly(entry):
        found = read(entry)
        if not held:
            held.append(None)
            held[0] = Lock(workdir)  # between the reading and the writing of the start below
        return found

    monkeypatch.setattr(lock_entry.ObjectEntry, "read", read_slowly)
    with pytest.raises(OSError, match="trains in this folder"):
        Lock(workdir)
    with held[0]:
        assert held[0]._is_ours(json.loads(read(held[0]._entry)))
        # A start that takes over the same entry writes late: the holder ends.
        late = Lock.__new__(Lock)
        late.__dict__ |= {"_entry": held[0]._entry, "_token": "late", "_since": "now", "_beats": 0}
        while held[0]._lost is None:
            late._write()
            time.sleep(0.05)
        with pytest.raises(OSError, match="has taken this folder over"):
            held[0].check()
    # An entry that cannot be read is replaced.
    storage.write_text(workdir.lock, "[]")
    with Lock(workdir) as third:
        third.check()


def test_a_start_that_loses_an_answer_takes_the_lock(faulty, quick):
    workdir = Workdir(faulty.bucket)
    faulty.use(first(1, LOST))
    with Lock(workdir) as held:
        held.check()
        assert held._is_ours(json.loads(workdir.lock.read_bytes()))
    assert LOST in {fault for _, _, fault in faulty.requests}
    assert not workdir.lock.exists()


def test_an_error_of_any_kind_leaves_the_holder_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    with Lock(Workdir(tmp_path)) as held:

        def fail() -> bytes:
            raise RuntimeError("a library's own error")

        monkeypatch.setattr(held._entry, "read", fail)
        beats = held._beats
        while held._beats < beats + 3:
            assert held._thread.is_alive()
            time.sleep(0.01)
