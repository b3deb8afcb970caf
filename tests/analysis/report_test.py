"""convit analyse report: sections, escaped text, what is left out, and the page in a browser."""

from html import escape
from html.parser import HTMLParser
import json
import re
import shutil

import browser
import jax
import numpy as np
from PIL import Image
import pytest
from small_models import DEIT, MODEL, random_params

from convit_jax import recipe
from convit_jax.analysis import charts
from convit_jax.analysis import page as page_of
from convit_jax.cli import analyse
from convit_jax.data.identity import Identity
from convit_jax.model.normalise import normalise
from convit_jax.model.variants import options_of_kind
from convit_jax.train import same_run, setup
from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

SECTIONS = (
    "The run", "Training", "Locality during training", "Locality of the weights",
    "Attention maps", "Masking", "Confusion", "Worst mistakes",
)  # fmt: skip
MEAN, STD = (0.4,) * 3, (0.3,) * 3  # those of analyse_test, which compiles the same programs
EMPTY = {"meta", "img", "br", "path", "polyline", "circle"}  # elements without an end


class Checked(HTMLParser):
    """Asserts that elements nest, that images have texts, and that nothing is outside the page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert "href" not in found
        if tag == "img":
            assert found["alt"]
            assert found["src"].startswith("data:image/")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in EMPTY

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(folder, model, names, size=(16, 16)):
    """Writes the workdir of a finished run with random weights; returns it and the parameters."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"<i>{i}.png")
    config = recipe.get_config()
    config.data.update(source=f"folder:{folder / 'data'}", workers=0, mean=MEAN, std=STD)
    config.augment.eval_crop = 1.0
    config.train.update(batch_size=4, epochs=2.0)
    config.model.update({k: getattr(model, k) for k in config.model if k in
                         options_of_kind("structure")}, image_size=model.image_size)  # fmt: skip
    workdir = Workdir(folder / "run")
    workdir.path.mkdir()
    data = {s: Identity.of(setup.open_split(config, s, workdir)) for s in ("train", "test")}
    same_run.record_start(workdir, config, data, step=0)
    params = jax.tree.map(lambda x: 0.5 * x, random_params(model))
    safetensors.save_weights(
        workdir.weights, Loaded(model, params, class_names=tuple(sorted(names)))
    )
    _, total = setup.number_of_steps(config, 2 * len(names))
    measured = {"nonlocality": [1.0 + i for i in range(model.depth)]}
    if model.local_up_to_layer:
        measured["head_gates"] = [[0.7] * model.num_heads] * model.local_up_to_layer
    with workdir.metrics.open("w") as file:
        for step in (1, total // 2, total):
            loss = None if step == 1 else 2.5 / step
            train = {"loss": loss, "learning_rate": 1e-3 * step}
            test = {"loss": 2.0, "top1": step / total / 2, "top5": 1.0, "ema_top1": 0.5}
            for kind, values in (("train", train), ("eval", test | measured)):
                file.write(json.dumps({"kind": kind, "step": step, "time": 0.0, **values}) + "\n")
    return workdir, params


def written(workdir, *flags):
    analyse.main(["report", f"--workdir={workdir}", *flags])
    page = workdir.report.read_text()
    text = Checked(page).text
    assert re.findall("<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert not re.search(r"https?:|url\(|@import|<i>|<u>&", page)
    return page, text


def test_a_page_has_every_section_and_says_what_is_left_out(tmp_path, capsys, monkeypatch):
    shown, html = [], page_of.html
    monkeypatch.setattr(page_of, "html", lambda report: shown.append(report) or html(report))
    names = ['<u>&"1', "zwölf", "three", "4", "5"]
    workdir, params = make_run(tmp_path, MODEL, names)
    page, text = written(workdir)
    assert f"wrote {workdir.report}" in capsys.readouterr().out
    assert "Left out" not in text
    assert page.isascii()
    assert "are trained. Top-1 accuracy" in text
    for expected in ('<u>&"1', "averaged weights: 50%", "Gates of layer 2", "content", "<i>0.png",
                     "zwölf", "model.embed_dim"):  # fmt: skip
        assert expected in text
    paths = sorted((tmp_path / "data" / "val").glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = [sorted(names).index(path.parent.name) for path in paths]
    logits = jax.jit(MODEL.apply)({"params": params}, normalise(images, MEAN, STD))
    shares = np.asarray(jax.nn.softmax(logits))
    of_label = shares[np.arange(10), labels]
    wrong = np.flatnonzero(shares.argmax(axis=-1) != labels)
    worst = wrong[np.argsort(of_label[wrong])]
    (found,) = shown
    assert found.tested.wrong == len(wrong) > 2
    assert [m.name for m in found.tested.mistakes] == [
        f"{paths[i].parent.name}/{paths[i].name}" for i in worst
    ]
    for mistake, i in zip(found.tested.mistakes, worst, strict=True):
        np.testing.assert_array_equal(mistake.pixels, images[i])
        assert mistake.label == sorted(names)[labels[i]]
        assert mistake.predicted == sorted(names)[shares[i].argmax()]
        assert mistake.probability == pytest.approx(of_label[i], rel=1e-3)
        assert mistake.predicted_probability == pytest.approx(shares[i].max(), rel=1e-3)

    # Data that are gone, in a run that is not finished, of a version without the probe.
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()[:4]]
    lines = [{k: v for k, v in line.items() if not isinstance(v, list)} for line in lines]
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, text = written(workdir)
    assert "the page has nothing of the test images" in capsys.readouterr().err
    assert text.count("Left out") == 6  # non-locality (twice), maps, masking, confusion, mistakes
    assert "2 of 5 steps are trained. The run is not finished." in text
    assert escape(str(tmp_path / "data")) in page
    assert "the share of the positional attention" in text
    # A run that has just begun, and one of a version that recorded less.
    workdir.weights.unlink()
    for path in (workdir.metrics, workdir.data, workdir.starts):
        path.unlink()
    page, text = written(workdir)
    assert text.count("Left out") == 8
    assert "holds no checkpoint" in text
    with pytest.raises(SystemExit, match="expected the workdir of a run"):
        analyse.main(["report", f"--workdir={tmp_path}"])


def test_a_chart_has_round_ticks_and_leaves_out_what_is_not_finite():
    points = [(float(i), None if i == 3 else 0.1 * i) for i in range(8)]
    drawn = charts.chart("<Loss>", [charts.Line("a&b", points)], "epoch")
    assert drawn.count("<circle") == 7
    assert "&lt;Loss&gt;: a&amp;b from 0 to 0.7" in drawn
    assert re.findall(r'text-anchor="end">(.*?)<', drawn) == ["0", "0.2", "0.4", "0.6", "0.8"]
    assert charts.chart("Loss", [charts.Line("a", [(1, None)])], "epoch") == ""
    flat = charts.chart("Loss", [charts.Line("a", [(1, 0.3)])], "epoch", percent=True)
    assert "30%" in flat
    many = charts.chart("Loss", [charts.Line("a", [(i, 1.0) for i in range(5000)])], "step")
    assert 200 < many.count(",") < 320


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convit", "deit"])
def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(kind, tmp_path):
    """A DeiT with 25 classes of long names has no gates, and a list of confusions."""
    if kind == "convit":
        workdir, _ = make_run(tmp_path, MODEL, ["a", "b", "c", "d", "e"], size=(40, 24))
    else:
        names = [f"class_{i:02}_{'of_a_long_name' * 4}" for i in range(25)]
        workdir, _ = make_run(tmp_path, DEIT.clone(num_classes=25), names)
    page, text = written(workdir)
    assert ("no gates" in text) == (kind == "deit")
    assert ("most frequent confusions" in text) == (kind == "deit")
    if browser.find() is None:
        pytest.skip("no Chromium is installed; $CHROMIUM may name one")
    page = page.replace("<details>", "<details open>")
    for width in (360, 1280):
        pictures = []
        for dark in (False, True):
            path = tmp_path / f"{width}-{dark}.png"
            assert browser.open_page(page, width, dark, path) <= width
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("L"))[:, :width])
        light, dark = (float(np.median(p)) for p in pictures)
        assert light > 200 > 60 > dark
