"""Images that are no squares of 224 pixels, from the command line to the last evaluation."""

import re

import runs

# Everything small but the image: 14 x 20 patches of 16 pixels.
SMALL = (
    "--config=configs/convit_ti.py",
    "--config.model.image_size=224,320",
    "--config.model.embed_dim=16",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.data.workers=0",
    "--config.data.repeats=1",
    "--config.train.batch_size=6",
    "--config.train.epochs=1",
    "--config.train.log_every=1",
)


def test_a_rectangle_trains_and_is_evaluated(tmp_path):
    from safetensors.numpy import load_file

    runs.write_images(tmp_path / "images", per_class=4)
    workdir = tmp_path / "run"
    flags = (*SMALL, f"--config.data.source=folder:{tmp_path / 'images'}")
    runs.finish(runs.start(workdir, *flags, devices=1), workdir)
    assert re.search(r"\d of 3 images\) after 2 steps", runs.output(workdir))
    lines = runs.metrics(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2]
    assert load_file(workdir / "weights.safetensors")["pos_embed"].shape == (1, 14 * 20, 16)

    turned = (*flags, "--config.model.image_size=320,224")
    runs.finish(runs.start(workdir, *turned, devices=1), workdir, code=1)
    assert "model.image_size: there [224, 320], now [320, 224]" in runs.output(workdir)
