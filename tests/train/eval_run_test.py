"""Evaluation of weights (compared with timm image by image), of runs, at other sizes; refusals."""

import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import make_imagenet
import numpy as np
from PIL import Image
import pytest
import reference
import runs
from runs import ROOT

from configs import convit_ti, digits
import convit_jax
from convit_jax.data import class_names
from convit_jax.data.images import transforms
from convit_jax.data.open import open_source
from convit_jax.train import eval_run, eval_setup, loop, setup
from convit_jax.weights import safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

IMAGES = 40


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A tfds folder of ImageNet with 40 validation photographs."""
    folder = tmp_path_factory.mktemp("imagenet")
    examples = make_imagenet.make_examples(per_class=1, validation=IMAGES)
    make_imagenet.write_tfds(folder, examples, "array_record")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small ConViT of timm with random values in every tensor: its state dict and .pth file."""
    _, torch = reference.import_timm()
    model = make_timm(64)
    reference.randomise(model, torch, seed=2)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return model.state_dict(), path


def make_timm(size):
    from timm.models.convit import ConVit

    return ConVit(img_size=size, embed_dim=8, num_heads=4, depth=2, local_up_to_layer=1).eval()


def timm_logits(state_dict, size, imagenet):
    """Returns the logits (IMAGES, 1000) by timm's transform and model, and the labels."""
    timm, torch = reference.import_timm()
    from timm.layers import resample_abs_pos_embed

    model = make_timm(size)
    resized = resample_abs_pos_embed(
        state_dict["pos_embed"], [size // 16, size // 16], num_prefix_tokens=0
    )
    model.load_state_dict({**state_dict, "pos_embed": resized})
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({"crop_pct": 0.875, "input_size": (3, size, size)})
    )
    source = open_source("tfds:imagenet2012", "test", data_dir=str(imagenet))
    examples = [source[i] for i in range(len(source))]
    images = [Image.open(io.BytesIO(example["image"])).convert("RGB") for example in examples]
    with torch.inference_mode():
        logits = model(torch.stack([transform(image) for image in images]))
    return logits.numpy(), np.array([example["label"] for example in examples])


def assert_is_timms(folder, result, logits, labels):
    """Asserts that the five classes of every image and the resulting figures are timm's."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["image_size"] == result["image_size"]]
    order = np.argsort(-logits, axis=-1)[:, :5]
    assert [line["index"] for line in lines] == list(range(IMAGES))
    assert [line["label"] for line in lines] == labels.tolist()
    assert [line["top5"] for line in lines] == order.tolist()
    shares = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), order, axis=-1)
    np.testing.assert_allclose([line["probabilities"] for line in lines], shares, atol=2e-6)
    names = class_names.readable(None, 1000)
    assert [line["label_name"] for line in lines] == [names[label] for label in labels]
    assert [line["top5_names"][4] for line in lines] == [names[row[4]] for row in order]
    files = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, IMAGES + 1)]
    assert sorted(line["file"] for line in lines) == files
    right = order == labels[:, None]
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(IMAGES), labels]
    assert result["images"] == IMAGES
    assert result["top1"] == right[:, 0].mean()
    assert result["top5"] == right.any(-1).mean()
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_every_image_gets_timms_prediction_on_one_device_and_of_two_processes(
    imagenet, small, tmp_path
):
    state_dict, path = small
    given = (
        "--mode=eval", "--config=configs/convit_ti.py", f"--config.init_from={path}",
        f"--config.data.dir={imagenet}", "--config.data.workers=0", "--predictions",
        "--config.model.image_size=64", "--config.model.depth=2", "--config.model.embed_dim=32",
        "--config.model.local_up_to_layer=1", "--config.train.batch_size=16",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    started = [(runs.start(one, *given, devices=1), one)]
    started += [(process, two) for process in runs.start_pair(two, *given)]
    expected = timm_logits(state_dict, 64, imagenet)
    for process, folder in started:
        runs.finish(process, folder)
    for folder, devices, processes in ((one, 1, 1), (two, 8, 2)):
        report = json.loads((folder / "eval.json").read_text())
        assert report["devices"].startswith(f"{devices} x ")
        assert report["processes"] == processes
        (result,) = report["results"]
        assert_is_timms(folder, result, *expected)
        output = runs.output(folder)
        assert "Traceback" not in output
        assert len([x for x in output.splitlines() if x.startswith("64 x 64  ")]) == 1  # one table


def test_other_sizes_are_timms_too_on_eight_devices(imagenet, small, tmp_path, capsys):
    """timm's ConViT takes no rectangles, so those are compared with the model that `load` makes."""
    state_dict, path = small
    config = small_config(imagenet, path)
    sizes = ((96, 96), (64, 96))
    options = eval_setup.Choices(sizes=sizes, predictions=True)
    prepared = eval_setup.prepare(config, Workdir(tmp_path), options)
    assert prepared.mesh.size == 8
    results = eval_run.run(prepared)["results"]
    assert_is_timms(tmp_path, results[0], *timm_logits(state_dict, 96, imagenet))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0].strip() for row in rows[1:]] == ["96 x 96", "64 x 96"]
    first = json.loads((tmp_path / "predictions.jsonl").read_text().partition("\n")[0])
    assert first["file"] == prepared.source[0]["name"]
    assert len(results[0]["by_class"]) == 1000
    assert sum(mistake["images"] for mistake in results[0]["confusions"]) <= IMAGES

    model, variables = convit_jax.load(path, image_size=(64, 96))
    pixels = np.stack(
        [transforms.EvalTransform((64, 96))(prepared.source[i]["image"]) for i in range(IMAGES)]
    )
    images = (pixels / 255 - np.array(config.data.mean)) / np.array(config.data.std)
    logits = np.asarray(model.apply(variables, jnp.asarray(images, jnp.float32)))
    labels = np.array([prepared.source[i]["label"] for i in range(IMAGES)])
    assert_is_timms(tmp_path, results[1], logits, labels)


def small_config(imagenet, path):
    config = convit_ti.get_config()
    config.init_from = str(path)
    config.data.update(dir=str(imagenet), workers=0)
    config.model.update(image_size=64, depth=2, embed_dim=32, local_up_to_layer=1)
    config.train.batch_size = 16
    return config


@pytest.fixture(scope="module")
def run_of_digits(tmp_path_factory):
    """A run on 8 devices, its state split over them, with averaged weights: 3 evaluations."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    config = digits.get_config()
    config.model.update(patch_size=4, embed_dim=64, depth=2, local_up_to_layer=1)
    config.train.update(epochs=3.0, batch_size=64, eval_every=1.0)
    config.optim.ema_decay = 0.9
    config.mesh.fsdp = 8
    loop.train(setup.prepare(config, Workdir(folder)))
    return folder


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "eval"}


def evaluate_run(folder, config=None, **options):
    report = eval_run.run(
        eval_setup.prepare(config, Workdir(folder), eval_setup.Choices(**options))
    )
    (result,) = report["results"]
    return report, result


@pytest.mark.slow
def test_a_run_is_evaluated_as_it_evaluated_itself(run_of_digits):
    evaluated = evaluations(run_of_digits)
    kept = runs.steps_saved(run_of_digits)
    best = max(kept, key=lambda step: (evaluated[step]["top1"], step))
    best_ema = max(kept, key=lambda step: (evaluated[step]["ema_top1"], step))
    for name, step in (("top1", best), ("ema_top1", best_ema)):  # neither was deleted
        assert evaluated[step][name] == max(line[name] for line in evaluated.values())
    for options, step, prefix in (
        ({"ema": False}, best, ""),
        ({"ema": False, "checkpoint": "newest"}, kept[-1], ""),
        ({"ema": False, "checkpoint": str(kept[0])}, kept[0], ""),
        ({"ema": True}, best_ema, "ema_"),
        ({}, best_ema, "ema_"),  # what the run hands out
    ):
        report, result = evaluate_run(run_of_digits, **options)
        assert report["step"] == step
        assert report["ema"] == bool(prefix)
        for name in ("top1", "top5", "images"):
            assert result[name] == evaluated[step][prefix + name]
        assert result["loss"] == pytest.approx(evaluated[step][prefix + "loss"], rel=1e-5)
        assert [c["class"] for c in result["by_class"]] == [str(digit) for digit in range(10)]
        right = sum(c["images"] * c["top1"] for c in result["by_class"])
        assert right == pytest.approx(np.trace(result["confusion"]))
        assert right == pytest.approx(result["images"] * result["top1"])
    assert report["chosen"] == "the best checkpoint by top-1 of the averaged weights"
    written = json.loads((run_of_digits / "eval.json").read_text())
    assert written["results"] == [result]
    assert not list(run_of_digits.glob("*.part"))


@pytest.mark.slow
def test_a_run_on_other_devices_and_weights_without_a_workdir(run_of_digits):
    """A run of eight devices is evaluated on one device, by two processes, and by its weights."""
    newest = runs.steps_saved(run_of_digits)[-1]
    expected = evaluations(run_of_digits)[newest]
    given = ("--mode=eval", "--checkpoint=newest")
    runs.finish(runs.start(run_of_digits, *given, "--no-ema", devices=1), run_of_digits)
    one = json.loads((run_of_digits / "eval.json").read_text())
    for process in runs.start_pair(run_of_digits, *given, devices=2):
        runs.finish(process, run_of_digits)
    two = json.loads((run_of_digits / "eval.json").read_text())
    for report, prefix, devices in ((one, "", "1 x"), (two, "ema_", "4 x")):
        assert report["devices"].startswith(devices)
        assert report["step"] == newest
        (result,) = report["results"]
        assert result["top1"] == expected[prefix + "top1"]
        assert result["loss"] == pytest.approx(expected[prefix + "loss"], rel=1e-5)

    done = subprocess.run(
        [
            sys.executable, "main.py", "--mode=eval", "--config=configs/digits.py",
            "--config.model.patch_size=4", "--config.model.depth=2",
            "--config.model.local_up_to_layer=1",
            f"--config.init_from={run_of_digits / 'weights.safetensors'}",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, row, _, *by_class = done.stdout.splitlines()
    assert [line.split()[-1] for line in by_class] == ["class", *map(str, range(10))]
    assert header.split() == ["image", "top-1", "top-5", "loss", "images", "images/s"]
    # The weights that a run writes at its end are the averaged ones.
    assert row.split()[3:6] == [
        f"{expected['ema_top1']:.3%}", f"{expected['ema_top5']:.3%}",
        f"{expected['ema_loss']:.4f}",
    ]  # fmt: skip


def test_a_contradiction_names_the_key(imagenet, small):
    _, path = small
    config = small_config(imagenet, path)
    config.model.update(depth=3, image_size=96, num_heads=8)
    with pytest.raises(ValueError, match="the configuration's model is not that of ") as error:
        eval_setup.prepare(config, None, eval_setup.Choices())
    assert str(error.value).splitlines()[1:] == [
        "  model.image_size: the configuration says 96, the weights 64 "
        "(--eval_size=96 interpolates the position embedding)",
        "  model.depth: the configuration says 3, the weights 2",
        "  model.num_heads: the configuration says 8, the weights 4",
    ]


def test_classes_are_found_by_name_and_unknown_ones_are_refused(imagenet, small, tmp_path):
    _, path = small
    runs.write_images(tmp_path / "images", per_class=4)
    config = small_config(imagenet, path)
    config.data.source = f"folder:{tmp_path / 'images'}"
    with pytest.raises(ValueError, match=r"3 of the 3 classes of folder:.* of .*small\.pth: "):
        eval_setup.prepare(config, None, eval_setup.Choices())

    loaded = read_weights(path, num_classes=3)
    config.init_from = str(tmp_path / "three.safetensors")
    for names, message in (
        (("class0", "class2", "class1"), None),
        (("class0", "class2", "class3"), r"1 of the 3 classes of .*three\.\w+: 'class1'"),
    ):
        three = Loaded(loaded.model, loaded.params, class_names=names)
        safetensors.save_weights(config.init_from, three)
        if message:
            with pytest.raises(ValueError, match=message):
                eval_setup.prepare(config, None, eval_setup.Choices())
        else:
            prepared = eval_setup.prepare(config, None, eval_setup.Choices())
            assert prepared.classes.logits == (0, 2, 1)
            assert prepared.share.batch_size == 8  # 3 images, 8 devices


def test_classes_without_images_are_left_out_of_imagenet_a_and_said_of_real(
    imagenet, small, tmp_path, caplog
):
    _, path = small
    config = small_config(imagenet, path)
    for name in ("imagenet_a", "imagenet2012_real"):
        (tmp_path / name).symlink_to(imagenet / "imagenet2012")
    config.data.update(dir=str(tmp_path), source="tfds:imagenet_a:5.1.0")
    prepared = eval_setup.prepare(config, None, eval_setup.Choices())
    labels = {prepared.source[i]["label"] for i in range(IMAGES)}
    assert 1 < len(labels) <= IMAGES
    assert prepared.classes.kept == tuple(sorted(labels))
    config.data.source = "tfds:imagenet2012_real"
    prepared = eval_setup.prepare(config, None, eval_setup.Choices())
    assert prepared.classes.is_identity
    assert "imagenet2012_real: the labels are ImageNet's own" in caplog.text


def test_mistakes_are_named(imagenet, small, tmp_path):
    _, path = small
    config = small_config(imagenet, tmp_path / "no.pth")
    with pytest.raises(OSError, match=r"no such file or folder: .*no\.pth"):
        eval_setup.prepare(config, None, eval_setup.Choices())
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0")
    config.init_from = str(tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match=r"torn\.safetensors: not a readable safetensors file"):
        eval_setup.prepare(config, None, eval_setup.Choices())
    config.init_from = ""
    with pytest.raises(ValueError, match=r"nothing to evaluate: .* holds no run \(config.json\)"):
        eval_setup.prepare(config, Workdir(tmp_path), eval_setup.Choices())
    with pytest.raises(ValueError, match="nothing to evaluate: no --workdir of a run is given"):
        eval_setup.prepare(None, None, eval_setup.Choices())
    with pytest.raises(ValueError, match="--predictions: expected --workdir"):
        eval_setup.prepare(config, None, eval_setup.Choices(predictions=True))
    config.init_from = str(path)
    with pytest.raises(ValueError, match="image_size: expected a multiple of patch_size=16"):
        eval_setup.prepare(config, None, eval_setup.Choices(sizes=((64, 65),)))


@pytest.mark.slow
def test_mistakes_about_a_run_are_named(small, run_of_digits):
    _, path = small
    with pytest.raises(ValueError, match=r"model\.patch_size: .* 2, the weights 4\n") as error:
        eval_setup.prepare(digits.get_config(), Workdir(run_of_digits), eval_setup.Choices())
    assert "Without --config a run is evaluated with its own." in str(error.value)
    config = digits.get_config()
    config.init_from = str(path)
    with pytest.raises(
        ValueError, match=r"holds a run, which would be evaluated, not .*small\.pth"
    ):
        eval_setup.prepare(config, Workdir(run_of_digits), eval_setup.Choices())
    for checkpoint, kind, message in (
        ("3", FileNotFoundError, r"no checkpoint of step 3; there are \[\d+, "),
        ("latest", ValueError, "expected best, newest or a step, got 'latest'"),
    ):
        with pytest.raises(kind, match=message):
            eval_setup.prepare(None, Workdir(run_of_digits), eval_setup.Choices(checkpoint))
