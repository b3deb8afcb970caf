"""Images other than squares of 224 pixels, from the command line to the predictions."""

import json
import re

import pytest
import runs

from convit_jax.cli import options, predict
from convit_jax.model import image_size
from convit_jax.train import same_run
from convit_jax.workdir.folder import Workdir

# Everything small but the image.
SMALL = (
    "--config=configs/convit_ti.py",
    "--config.model.embed_dim=16",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.data.workers=0",
    "--config.data.repeats=1",
    "--config.train.batch_size=2",
    "--config.train.epochs=0.34",  # two steps
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
def test_any_size_trains_and_is_evaluated_and_predicts(tmp_path, capsys, size, turned, attention):
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

    # The run does not continue with another size.
    others = [*flags[1:], f"--config.model.image_size={turned}"]
    other = options.configuration("convit_ti", others)
    with pytest.raises(ValueError, match=f"model.image_size: saved '{size}', now '{turned}'"):
        same_run.check_config(Workdir(workdir), other, {})

    # An evaluation takes the size that training refuses, together with the weights' own size.
    sizes = f"--eval_size={size},{turned}"
    runs.finish(runs.start(workdir, "--mode=eval", sizes, devices=1), workdir)
    results = json.loads((workdir / "eval.json").read_text())["results"]
    assert [result["images"] for result in results] == [3, 3]

    photos = sorted(map(str, images.glob("val/*/*.png")))
    assert predict.main([f"--weights={weights}", "--json", *photos]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(photos)
