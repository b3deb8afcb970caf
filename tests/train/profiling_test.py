"""The trace of `Profile` holds the right steps, and all of each."""

import gzip
import json
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from convit_jax.train.profiling import Profile


@jax.jit
def train_step(x):
    """Runs for some milliseconds on the device, and the caller does not wait for it."""
    return jax.lax.fori_loop(0, 20, lambda i, x: jnp.sin(x @ x) / 100, x)


def run(profile, steps):
    x = jnp.ones((300, 300))
    for step in steps:
        x = profile.step(step, train_step, x)
    return x


def traced(folder):
    """The steps that the host called and the number of those that the device ran."""
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if "name" in event]
    steps = [int(event["args"]["step_num"]) for event in events if event["name"] == "train"]
    return steps, sum(bool(re.fullmatch(r"while(\.\d+)?", event["name"])) for event in events)


@pytest.mark.parametrize(
    ("start", "total", "expected"),
    [(100, 130, [111, 112, 113, 114, 115]), (0, 8, [4, 5, 6, 7, 8]), (4, 5, [5])],
)
def test_some_steps_are_traced_and_no_others(tmp_path, caplog, start, total, expected):
    caplog.set_level(logging.INFO)
    with Profile(tmp_path / "profile", start, total) as profile:
        run(profile, range(start + 1, total + 1))
    assert traced(tmp_path / "profile") == (expected, len(expected))
    (message,) = (m for m in caplog.messages if m.startswith("wrote a trace"))
    assert f"of steps {expected[0]} to {expected[-1]}: look at it with `xprof {tmp_path}" in message


def test_a_run_that_is_stopped_leaves_the_trace_of_its_steps(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def stopped():
        with Profile(tmp_path, 0, 20) as profile:
            run(profile, range(1, 13)).block_until_ready()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert traced(tmp_path) == ([11, 12], 2)
    assert "steps 11 to 12" in caplog.text


def test_nothing_is_traced_unless_asked_for(tmp_path):
    with Profile(tmp_path / "profile", 0, 20, enabled=False) as profile:
        run(profile, range(1, 21))
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "profile").touch()
    profile = Profile(tmp_path / "profile", 0, 1)
    with pytest.raises(OSError, match=f"the trace could not be written to {tmp_path}/profile: "):
        run(profile, [1])
