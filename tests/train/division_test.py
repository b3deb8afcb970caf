"""A run of an earlier version goes on with its own division and its own way to read images."""

import json
import os

from image_files import classes, make_files
import numpy as np
from PIL import Image
import pytest

from configs import finetune
from convit_jax import recipe, saved_config
from convit_jax.data.arrays import ArraySource
from convit_jax.data.fit import reading, settle_reading
from convit_jax.data.images.reading import AS_SHOWN, Reading
from convit_jax.train import eval_setup, setup
from convit_jax.workdir.folder import Workdir


@pytest.fixture
def old_run(tmp_path):
    """A configuration, and the workdir of a run that format 2 of the same configuration started."""
    files = classes("images", "a b", 20)
    make_files(tmp_path, *files)
    for file in files:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / file)
    config = finetune.get_config()
    config.data.update(source=f"folder:{tmp_path / 'images'}", workers=0)
    config.model.update(
        name="convit_base", image_size=32, depth=2, embed_dim=32, local_up_to_layer=1
    )
    config.train.batch_size = 8
    config.init_from = ""
    saved = saved_config.to_json(config) | {"format_version": 2}
    del saved["data"]["held_out"], saved["data"]["exif"], saved["data"]["alpha"]
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    workdir.config.write_text(json.dumps(saved))
    return config, workdir


EVERY_TENTH = {f"{name}/{i:03}.jpg" for name in "ab" for i in (4, 14)}


def test_the_same_command_resumes_it_with_its_own_images(old_run, caplog):
    caplog.set_level("INFO", "convit_jax")
    config, workdir = old_run
    run = setup.prepare(config, workdir)
    train, test = run.train_chunks.source, run.test_chunks.source
    assert {*map(os.fsdecode, test.names)} == EVERY_TENTH
    assert not {*map(os.fsdecode, train.names)} & EVERY_TENTH
    assert "data.held_out: 'spread', as the run has it, not 'hash'" in caplog.text
    assert run.config.data.held_out == "spread"  # and so it is saved
    assert (run.config.data.exif, run.config.data.alpha) == (False, "drop")
    assert run.train_chunks.transform.reading == run.test_chunks.transform.reading == Reading()
    for text in ("data.exif: False, as the run has it", "grey images of more than 8 bits"):
        assert text in caplog.text
    config.data.exif = True
    with pytest.raises(ValueError, match=r"data\.exif: saved False, now True"):
        setup.prepare(config, workdir)


def test_an_evaluation_reads_the_images_that_it_held_out(old_run, monkeypatch):
    config, workdir = old_run
    monkeypatch.setattr(eval_setup, "read_weights", lambda *args, **options: None)
    for given in (None, config):
        used, *_ = eval_setup._weights(given, workdir, eval_setup.Choices())
        source = setup.open_split(used, "test", workdir)
        assert {*map(os.fsdecode, source.names)} == EVERY_TENTH


def test_a_new_run_holds_out_by_hash_and_reads_what_viewers_show(old_run):
    config, workdir = old_run
    workdir.config.unlink()
    run = setup.prepare(config, workdir)
    assert run.config.data.held_out == "hash"
    assert (run.config.data.exif, run.config.data.alpha) == (True, "white")
    assert run.train_chunks.transform.reading == run.test_chunks.transform.reading == AS_SHOWN
    assert {*map(os.fsdecode, run.test_chunks.source.names)} != EVERY_TENTH


def test_images_of_imagenet_and_tfds_are_read_as_timm_reads_them():
    empty = np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int)
    for source, names, expected in (
        ("tfds:imagenet2012", ("n01440764", "n01443537"), Reading()),
        ("folder:imagenet", ("n01440764", "n01443537"), Reading()),
        ("tfds:cars196", ("a", "b"), Reading()),
        ("folder:photos", ("n01440764", "b"), AS_SHOWN),
    ):
        config = recipe.get_config()
        config.data.source = source
        settle_reading(config, ArraySource(*empty, names, np.array([b""])))
        assert reading(config) == expected
        config.data.update(exif=not expected.exif, alpha=expected.alpha)  # chosen by the user
        settle_reading(config, ArraySource(*empty, names, np.array([b""])))
        assert reading(config) == Reading(not expected.exif, expected.alpha)
