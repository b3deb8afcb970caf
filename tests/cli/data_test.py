"""Training from a small ImageNet: real photographs in the real formats."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import compiling
import jax
import make_imagenet
import numpy as np
from PIL import Image
import pytest
from runs import ROOT
from small_models import random_params

from configs import convit_ti, finetune
from convit_jax.cli import data as command
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.train import loop, setup
from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with TFRecord, ArrayRecord and class folders of the same 32 + 8 photographs."""
    root = tmp_path_factory.mktemp("imagenet")
    examples = make_imagenet.make_examples(per_class=4, validation=8)
    for file_format in ("tfrecord", "array_record"):
        make_imagenet.write_tfds(root / file_format, examples, file_format)
    make_imagenet.write_folder(root / "folder", examples)
    return root


def small(config):
    config.model.update(image_size=64, depth=3, local_up_to_layer=2, embed_dim=64)
    config.train.update(batch_size=32, log_every=1, probe_images=0)
    return config


def run(*command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": compiling.flags()}  # one device, as a user has
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


def test_main_trains_on_tfrecords_with_the_whole_recipe(imagenet, tmp_path):
    done = run(
        "main.py", "--config=configs/convit_ti.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.dir={imagenet / 'tfrecord'}", "--config.data.workers=2",
        "--config.model.image_size=64", "--config.model.depth=3", "--config.model.embed_dim=36",
        "--config.model.local_up_to_layer=2", "--config.train.batch_size=16",
        "--config.train.epochs=2", "--config.optim.ema_decay=0.9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "32 images" in done.stderr
    assert re.search(r"test accuracy \d+\.\d+% \(\d of 8 images\) after 4 steps", done.stderr)
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == lines[-1]["ema_images"] == 8


@pytest.mark.slow
def test_32_images_are_learnt_by_heart(imagenet, tmp_path):
    """Without augmentation or regularisation the loss falls below 0.1."""
    config = small(convit_ti.get_config())
    config.data.update(dir=str(imagenet / "array_record"), repeats=1, workers=0)
    config.augment.update(crop="none", flip=0.0, randaugment_ops=0, color_jitter=0.0)
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    config.model.drop_path = 0.0
    config.train.update(label_smoothing=0.0, epochs=140.0, eval_every=140.0)
    config.optim.update(lr=0.05, warmup_epochs=5.0, weight_decay=0.0)
    run = setup.prepare(config, Workdir(tmp_path))
    # The pixels are always the same, and decoding each photo 140 times would take the longest.
    rng = np.random.default_rng(0)
    once = functools.cache(lambda image: run.train_chunks.transform(image, rng))
    chunks = dataclasses.replace(run.train_chunks, transform=lambda image, _: once(image))
    loop.train(dataclasses.replace(run, train_chunks=chunks))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 140
    assert losses[0] > 6  # 1,000 classes: log(1000) is 6.9
    assert losses[-1] < 0.1


def test_fine_tuning_on_a_folder_from_weights_of_another_size(imagenet, tmp_path):
    config = small(finetune.get_config())
    config.model.num_classes = None
    config.data.update(source=f"folder:{imagenet / 'folder'}", workers=0)
    config.train.epochs = 4.0
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    pretrained = small(convit_ti.get_config())
    pretrained.model.image_size = 96
    model = setup.make_model(pretrained)
    params = jax.tree.map(lambda x: 0.02 * x, random_params(model))
    load = tmp_path / "pretrained.safetensors"
    safetensors.save_weights(load, Loaded(model, params))
    config.init_from = str(load)
    run = setup.prepare(config, Workdir(tmp_path / "run"))
    assert run.program.model.num_classes == 8
    assert run.init_params["head"]["kernel"].shape == (64, 8)
    assert run.init_params["pos_embed"].shape == (1, 16, 64)
    result = loop.train(run)
    assert result["images"] == 8
    config.init_new_head = False
    with pytest.raises(ValueError, match=r"head/kernel: expected \(64, 8\), got \(64, 1000\)"):
        setup.prepare(config, Workdir(tmp_path / "other"))


def test_part_of_the_data_for_the_same_number_of_images(imagenet, tmp_path):
    """Two flags give the setting of the paper's Table 2."""
    config = small(convit_ti.get_config())
    config.data.update(dir=str(imagenet / "array_record"), workers=0, repeats=1)
    config.train.update(epochs=10.0, batch_size=8)
    whole = setup.prepare(config.copy_and_resolve_references(), Workdir(tmp_path / "whole"))
    config.data.update(sampling_ratio=0.5, epochs_scale=2.0)
    half = setup.prepare(config, Workdir(tmp_path / "half"))
    assert len(whole.train_chunks.source) == 32
    assert len(half.train_chunks.source) == 16
    assert whole.total_steps == half.total_steps == 40
    assert len(half.test_chunks.source) == 8


def test_what_does_not_fit_is_refused(imagenet, tmp_path):
    cases = [
        ({"model.num_classes": 8}, ValueError, "expected 1000 as in tfds:imagenet2012, got 8"),
        ({"model.in_channels": 2}, ValueError, "in_channels: expected 3 or 1 as in tfds:imagenet"),
        ({"train.batch_size": 64}, ValueError, "expected at most the 32 images of tfds:imagenet"),
        ({"data.dir": str(tmp_path / "no")}, FileNotFoundError, r"convit data prepare"),
        ({"data.source": f"folder:{tmp_path}"}, (ValueError, OSError), str(tmp_path)),
    ]
    for overrides, kind, message in cases:
        config = small(convit_ti.get_config())
        config.data.dir = str(imagenet / "array_record")
        config.update_from_flattened_dict(overrides)
        with pytest.raises(kind, match=message):
            setup.prepare(config, Workdir(tmp_path / "run"))


def test_a_corrupt_image_stops_the_run_by_name_or_is_replaced(imagenet, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for folder in sorted((imagenet / "folder" / split).iterdir())[:2]:
            os.symlink(folder, tmp_path / "data" / split / folder.name)
    good = sorted((tmp_path / "data/train").iterdir())[0]
    bad = tmp_path / "data/train/zz"
    (tmp_path / "data/val/zz").mkdir()
    bad.mkdir()
    for image in good.iterdir():
        content = image.read_bytes()
        (bad / image.name).write_bytes(content)
        (tmp_path / "data/val/zz" / image.name).write_bytes(content)
    (bad / "broken.JPEG").write_bytes(b"this is no image")
    config = small(convit_ti.get_config())
    config.data.update(source=f"folder:{tmp_path / 'data'}", workers=0, repeats=1)
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    config.train.update(batch_size=8, epochs=2.0)
    with pytest.raises(CorruptImageError, match=r"zz/broken\.JPEG.*data\.skip_corrupt=True"):
        loop.train(setup.prepare(config, Workdir(tmp_path / "strict")))
    config.data.skip_corrupt = True
    loop.train(setup.prepare(config, Workdir(tmp_path / "lenient")))
    metrics = (tmp_path / "lenient/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("skipped_images", 0) for line in metrics) >= 1


def test_the_check_names_all_classes_of_a_small_set_and_draws_it(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    command.main(["check", "--config=digits", f"--pictures={sheet}"])
    shown = capsys.readouterr().out
    assert shown.count("classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n") == 2
    assert shown.endswith(f"wrote {sheet}\n")
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.width > 8 * 112
    with pytest.raises(SystemExit, match="error: --pictures: no such folder"):
        command.main(["check", "--config=digits", f"--pictures={tmp_path / 'no' / 'a.png'}"])


def test_the_check_command_names_corrupt_images(tmp_path, capsys):
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
    (tmp_path / "train/a/gone.png").symlink_to("nowhere.png")
    flags = ["check", "--config=configs/finetune.py", f"--config.data.source=folder:{tmp_path}"]
    flags += ["--config.data.workers=0", "--config.model.image_size=32"]
    with pytest.raises(SystemExit, match=r"a/gone\.png: cannot be read.*data\.skip_corrupt=True"):
        command.main(flags)
    command.main([*flags, "--config.data.skip_corrupt=True"])
    output = capsys.readouterr().out
    assert "1 of them are corrupt and would be skipped:" in output
    assert "a/gone.png: cannot be read" in output

    (tmp_path / "val/b/gone.png").symlink_to("nowhere.png")
    sheet = tmp_path / "sheet.png"
    command.main([*flags, "--config.data.skip_corrupt=True", f"--pictures={sheet}"])
    assert sheet.stat().st_size


def test_the_check_command(imagenet, tmp_path, capsys):
    flag = f"--config.data.dir={imagenet / 'tfrecord'}"
    done = run("-m", "convit_jax", "data", "check", "--config=configs/convit_ti.py", flag)
    assert done.returncode == 0, done.stderr
    for text in ("TFRecord", "32 images of 1,000 classes", "8 images of", "worker processes"):
        assert text in done.stdout
    flag = f"--config.data.dir={tmp_path / 'nowhere'}"
    with pytest.raises(SystemExit, match=r"error: .*convit data prepare --tars"):
        command.main(["check", "--config=configs/convit_ti.py", flag])
    for words, message in (
        (["look"], "invalid choice: 'look'"),
        (["prepare"], "the following arguments are required: --tars, --data_dir"),
        (["check"], "--config: expected one"),
        (["prepare", f"--tars={tmp_path}", f"--data_dir={tmp_path}"], "ILSVRC2012_img_train.tar"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main(words)
        if len(words) == 3:
            assert message in str(end.value)
        else:
            assert end.value.code == 2
            assert message in capsys.readouterr().err
