"""Whose a working directory is, and what is written down about a start."""

import json
import os
import stat

import pytest

from configs import digits
from convit_jax import workdir


@pytest.fixture
def started(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    workdir.record_start(path, digits.get_config(), 0, ["zero", "one"])
    return path


def changed(**overrides):
    config = digits.get_config()
    config.update_from_flattened_dict(overrides)
    return config


def test_the_same_run_goes_on(started):
    assert workdir.check(started, digits.get_config()) == []
    assert workdir.check(started / "new" / "folder", digits.get_config()) == []
    assert not (started / "new").exists()
    workdir.record_start(started, digits.get_config(), 7, ["zero", "one"])
    first, second = map(json.loads, (started / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 7)
    assert second["versions"].keys() >= {"jax", "flax", "optax", "orbax-checkpoint"}
    assert second["devices"] == "8 x cpu"
    assert len((second["git_revision"] or 40 * "x").removesuffix("-dirty")) == 40


def test_a_rectangle_is_the_same_after_it_was_saved(tmp_path):
    rectangle = changed(**{"model.image_size": (8, 12)})
    workdir.record_start(tmp_path, rectangle, 0, ["zero", "one"])
    assert workdir.check(tmp_path, rectangle) == []
    with pytest.raises(ValueError, match=r"model.image_size: there \[8, 12\], now \[12, 8\]"):
        workdir.check(tmp_path, changed(**{"model.image_size": (12, 8)}))
    with pytest.raises(ValueError, match=r"model.image_size: there \[8, 12\], now 8"):
        workdir.check(tmp_path, changed())


def test_what_may_change_is_said(started):
    config = changed(**{"train.epochs": 7.0, "data.workers": 3, "mesh.fsdp": 2})
    assert workdir.check(started, config) == [
        "data.workers: there None, now 3",
        "mesh.fsdp: there 1, now 2",
        f"train.epochs: there {digits.get_config().train.epochs}, now 7.0",
    ]


def test_another_model_or_recipe_is_refused_by_key(started):
    config = changed(**{"model.embed_dim": 32, "optim.lr": 0.1, "train.log_every": 3})
    config.mixup.new = 1
    with pytest.raises(ValueError, match=r"another configuration: choose another --work") as error:
        workdir.check(started, config)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  mixup.new: there None, now 1",
        "  model.embed_dim: there 64, now 32",
        f"  optim.lr: there {digits.get_config().optim.lr}, now 0.1",
    ]
    (started / "config.json").write_text('{"torn')
    with pytest.raises(ValueError, match=r"config.json: not readable: choose another --workdir"):
        workdir.check(started, digits.get_config())


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        workdir.check(tmp_path / "file" / "run", digits.get_config())
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(OSError, match="Permission denied"):
        workdir.check(tmp_path / "run", digits.get_config())
