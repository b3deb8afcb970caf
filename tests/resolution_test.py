"""Images other than squares of 224 pixels, from the command line to the predictions."""

import json
import re
import subprocess
import sys

import pytest
import runs

from convit_jax.model import image_size

# Everything small but the image.
SMALL = (
    "--config=configs/convit_ti.py",
    "--config.model.embed_dim=16",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.data.workers=0",
    "--config.data.repeats=1",
    "--config.train.batch_size=6",
    "--config.train.epochs=1",
    "--config.train.log_every=1",
)


@pytest.mark.parametrize(
    ("size", "turned", "attention"),
    [
        pytest.param("224x320", "320x224", "xla", marks=pytest.mark.slow),
        pytest.param("384", "224x320", "xla", marks=pytest.mark.slow),
        pytest.param("1024", "384", "chunked", marks=pytest.mark.slow),
    ],
)
def test_any_size_trains_and_is_evaluated_and_predicts(tmp_path, size, turned, attention):
    from safetensors.numpy import load_file

    images, workdir = tmp_path / "images", tmp_path / "run"
    runs.write_images(images, per_class=4)
    flags = (*SMALL, f"--config.data.source=folder:{images}", f"--config.model.image_size={size}")
    runs.finish(runs.start(workdir, *flags, devices=1), workdir)
    assert re.search(r"\d of 3 images\) after 2 steps", runs.output(workdir))
    assert f"attention: {attention}," in runs.output(workdir)
    lines = runs.metrics(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2]
    height, width = image_size.pair(image_size.parse(size))
    patches = height // 16 * (width // 16)
    weights = workdir / "weights.safetensors"
    assert load_file(weights)["pos_embed"].shape == (1, patches, 16)

    other = (*flags, f"--config.model.image_size={turned}")
    runs.finish(runs.start(workdir, *other, devices=1), workdir, code=1)
    assert f"model.image_size: saved '{size}', now '{turned}'" in runs.output(workdir)

    # An evaluation takes the size that training refused, together with the weights' own size.
    sizes = f"--eval_size={size},{turned}"
    runs.finish(runs.start(workdir, "--mode=eval", sizes, devices=1), workdir)
    results = json.loads((workdir / "eval.json").read_text())["results"]
    assert [result["images"] for result in results] == [3, 3]

    photos = sorted(map(str, images.glob("val/*/*.png")))
    command = [sys.executable, "-m", "convit_jax", "predict", f"--weights={weights}", "--json"]
    done = subprocess.run([*command, *photos], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(photos)
