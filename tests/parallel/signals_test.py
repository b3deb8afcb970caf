"""Signals: one stops a run, all its processes after the same step; workers do not get it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT
from several import finish, start_pair, wait_for

from convit_jax.parallel import signals

LOOP = """
from convit_jax.parallel.signals import Interruption
by_hand()
processes.check_devices()
processes.log_from_main()
with Interruption() as interruption:
    for step in range(10_000):
        multihost_utils.process_allgather(np.zeros(()))
        if jax.process_index() == 0:
            time.sleep(0.02)  # the other one runs ahead as far as it can
        if step == 3:
            print("step 3")
        if interruption.requested():
            break
print("stopped", step, interruption.requested())
before = time.perf_counter()
with Interruption() as again:
    for _ in range(1000):
        again.requested()
print("microseconds", 1e3 * (time.perf_counter() - before))
"""


def line_with(text: str, start: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(start)]
    assert len(lines) == 1, text
    return lines[0].split()


def test_signal_to_one_process_stops_all_at_the_same_step():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        pair = start_pair(LOOP)
        for process in pair:
            wait_for(process, "step 3")
        pair[1].send_signal(number)
        texts = finish(pair)
        assert [process.returncode for process in pair] == [0, 0], texts
        stops = [line_with(text, "stopped") for text in texts]
        assert stops[0] == stops[1], texts
        assert 3 < int(stops[0][1]) < 9_999, texts  # the texts have the service's warnings
        assert stops[0][2] == "True"
        if number == signal.SIGTERM:
            assert "stopping after this step: one of the processes got SIGTERM\n" in texts[0]
        else:
            assert f"stopping after this step: process 1 got {number.name}\n" in texts[0]
            said = "stopping after this step; send it again to stop at once"
            assert f"process 1 of 2: {number.name}: {said}" in texts[1]
        for text in texts:
            assert float(line_with(text, "microseconds")[1]) < 1000


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def handlers():
    """Replaces the handlers of the signals that stop a run by handlers that count."""
    counts = dict.fromkeys(STOPPING, 0)

    def count(number, frame):
        counts[number] += 1

    before = {number: signal.signal(number, count) for number in counts}
    try:
        yield counts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_first_signal_is_a_wish_and_the_second_an_order(number, monkeypatch, caplog):
    with handlers() as counts:
        with signals.Interruption() as asked:
            assert not asked.requested()
            signal.raise_signal(number)
            assert asked.requested()
            signal.raise_signal(number)  # immediately, as `timeout` does
            assert not any(counts.values())
            monkeypatch.setattr(signals, "_SAME_WISH", 0.0)
            signal.raise_signal(number)
            assert counts[number] == 1
            assert asked.requested()
        for each in STOPPING:
            signal.raise_signal(each)
        assert sum(counts.values()) == 1 + len(STOPPING)  # the previous handlers are back
    name = signal.Signals(number).name
    assert caplog.messages == [f"{name}: stopping after this step; send it again to stop at once"]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_was_ignored_stays_ignored(number, caplog):
    with handlers():
        signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
        with signals.Interruption() as asked:
            signal.raise_signal(number)
            assert not asked.requested()
        assert signal.getsignal(number) is signal.SIG_IGN
    assert caplog.messages == []


def test_old_handlers_are_back_after_an_error():
    with handlers() as counts:
        with pytest.raises(KeyError), signals.Interruption():
            raise KeyError
        signal.raise_signal(signal.SIGTERM)
        assert counts[signal.SIGTERM] == 1


FEED = """
import signal

from convit_jax.data.open import open_source
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.parallel import signals
from convit_jax.parallel.signals import Interruption

# The signals come at once, but while workers are started they wait to be handled. On a busy machine
# that is more than a second, after which another signal would end the process.
signals._SAME_WISH = 1200.0


def keep(image, rng):
    return image


if __name__ == "__main__":
    chunks = TrainChunks(open_source("digits", "train"), keep, Share(8), seed=0)
    with Interruption() as interruption:
        print("starting", flush=True)
        batches = iterate(chunks, workers=2)
        while not interruption.requested():
            next(batches)
        for _ in range(20):
            next(batches)
        print("20 batches after the signal", flush=True)
        signal.pause()
"""


def members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def test_workers_outlive_signals_but_not_their_parent(tmp_path):
    script = tmp_path / "feed.py"
    script.write_text(FEED)
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives
    )
    try:
        wait_for(process, "starting")
        time.sleep(0.5)  # the workers are being started
        for number in STOPPING:
            os.killpg(process.pid, number)
        text = wait_for(process, "20 batches after the signal")
        assert "Traceback" not in text
        assert len(members(process.pid)) > 2
    finally:
        process.kill()
    end = time.monotonic() + 1200
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    left = members(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert left == []
