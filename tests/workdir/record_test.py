"""The files that describe a run and its starts."""

import json

import numpy as np
import pytest

from convit_jax.workdir import record
from convit_jax.workdir.folder import Workdir


@pytest.fixture
def started(tmp_path):
    workdir = Workdir(tmp_path)
    data = {"train": {"images": 2}}
    hashes = {"train": np.array([3, 5], np.uint64)}
    record.record_start(workdir, {"seed": 3}, 0, ["zero", "one"], data, hashes)
    return workdir


def test_what_is_written_is_read(started):
    assert record.read_config(started) == {"seed": 3}
    assert record.read_class_names(started) == ("zero", "one")
    assert record.read_data(started) == {"train": {"images": 2}}
    assert record.read_fingerprints(started)["train"].tolist() == [3, 5]
    other = Workdir(started.path / "other")
    assert record.read_data(other) == record.read_fingerprints(other) == {}
    assert record.read_config(other) is None
    assert record.read_class_names(Workdir(started.path / "other")) is None


def test_each_start_has_a_line(started):
    record.record_start(started, {"seed": 3}, 7, ["zero", "one"], {}, {})
    first, second = map(json.loads, started.starts.read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 7)
    assert second["versions"].keys() >= {"jax", "flax", "optax", "orbax-checkpoint"}
    assert second["devices"] == "8 x cpu"


def test_the_revision_is_that_of_this_packages_own_checkout(started, monkeypatch, tmp_path):
    start = json.loads(started.starts.read_text())
    assert len((start["git_revision"] or 40 * "x").removesuffix("-dirty")) == 40
    # The package is installed in a folder of another repository, which does not track it.
    site = tmp_path / "repository" / "venv"
    site.mkdir(parents=True)
    record.subprocess.run(["git", "init", "-q", site.parent], check=True)
    monkeypatch.setattr(record, "__file__", str(site / "record.py"))
    assert record._git_revision() is None


@pytest.mark.parametrize("text", ['{"torn', "[]"])
def test_a_broken_configuration_is_named(started, text):
    started.config.write_text(text)
    with pytest.raises(ValueError, match=r"config.json: not readable: choose another --workdir"):
        record.read_config(started)
