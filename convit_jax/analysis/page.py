"""The page of a run: one HTML file that needs no network, from what `report` gathers."""

from collections.abc import Callable
from html import escape
import math
import pathlib
import shlex
from typing import Any

import jax
import numpy as np

from convit_jax import recipe, saved_config
from convit_jax.analysis.charts import Line, chart
from convit_jax.analysis.markup import folded, image, missing, scrolled, side_by_side, table
from convit_jax.analysis.report import Map, Mistake, Report, Tested
from convit_jax.model.locality import gates
from convit_jax.model.variants import describe

_STYLE = pathlib.Path(__file__).with_name("page.css")
_MATRIX = 20  # most classes whose confusion matrix is shown
_CONFUSIONS = 20  # most confusions that are shown for more classes
_UPRIGHT = 3  # letters of a class above which the heads of the matrix are turned
_PHOTO = 64  # pixels of the shorter side from which an image is a JPEG
_SERIES = {  # of an evaluation, and of training
    "Loss": (("training", "train", "loss"), ("test", "eval", "loss"),
             ("test, averaged weights", "eval", "ema_loss")),
    "Accuracy on the test images": (
        ("top-1", "eval", "top1"), ("top-5", "eval", "top5"),
        ("top-1, averaged weights", "eval", "ema_top1"),
        ("top-5, averaged weights", "eval", "ema_top5")),
    "Learning rate": (("learning rate", "train", "learning_rate"),),
}  # fmt: skip


def html(report: Report) -> str:
    """Returns the page. All text of the user's, such as names of files, is escaped."""
    sections = (
        ("The run", _run(report)),
        ("Training", _curves(report)),
        ("Locality during training", _probes(report)),
        ("Locality of the weights", _locality(report)),
        ("Attention maps", _of_tests(report, _maps)),
        ("Masking", _of_tests(report, _masking)),
        ("Confusion", _of_tests(report, _confusion)),
        ("Worst mistakes", _of_tests(report, _mistakes)),
    )
    style = _STYLE.read_text()
    title = f"Report of {report.workdir}"
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections)
    made = "".join(f" {escape(name)} {escape(text)}," for name, text in report.versions.items())
    whole = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>{_summary(report)}</header>"
        f"<main>{body}</main>"
        f"<footer>Made {escape(report.time)} by{made[:-1]}.</footer></body></html>\n"
    )
    return whole.encode("ascii", "xmlcharrefreplace").decode()  # legible in any encoding


def _summary(report: Report) -> str:
    """Returns the result in a sentence or two."""
    total = "" if report.total_steps is None else f" of {report.total_steps:,}"
    text = f"{report.step:,}{total} steps are trained."
    if report.total_steps is not None and report.step < report.total_steps:
        text += " The run is not finished."
    if report.tested is not None:
        best = report.tested.masking[0]
        text += f" Top-1 accuracy {best['top1']:.2%} on {best['images']:,} test images."
    return f"<p>{text}</p>"


def _run(report: Report) -> str:
    facts: list[tuple[str, str]] = []
    if (loaded := report.loaded) is not None:
        count = sum(np.size(x) for x in jax.tree.leaves(loaded.params))
        which = loaded.chosen or "the weights named"
        if loaded.step is not None:
            which += f", step {loaded.step:,}"
        if loaded.ema and "averaged" not in which:
            which += ", averaged"
        facts += [
            ("Model", describe(loaded.model)),
            ("Parameters", f"{count:,}"),
            ("Weights", which),
        ]
    facts += [
        (f"{split.capitalize()} data", f"{of['description']}: {of['images']:,} images")
        for split, of in report.data.items()
    ]
    if not report.data:
        facts.append(("Data", f"{report.config.data.source} (not recorded by this run's version)"))
    parts = [
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts) + "</dl>",
        "" if loaded is not None else missing(report.no_weights),
    ]
    return "".join([*parts, _recipe(report), _starts(report.starts)])


def _recipe(report: Report) -> str:
    default, chosen = saved_config.values(recipe.get_config()), saved_config.values(report.config)
    rows = [
        (key, _value(value), _value(default.get(key)))
        for key, value in sorted(chosen.items())
        if value != default.get(key)
    ]
    title = "Keys of the recipe that differ from their defaults"
    return table(title, ("key", "value", "default"), rows, "text")


def _starts(starts: list[dict[str, Any]]) -> str:
    """Returns a folded list of the starts. Runs of earlier versions record less of each."""
    items = []
    for start in starts:
        facts = [
            f"{key.replace('_', ' ')} {start[key]}"
            for key in ("time", "step", "devices", "processes", "git_revision", "python")
            if start.get(key) is not None
        ]
        facts += [f"{package} {version}" for package, version in start.get("versions", {}).items()]
        command = escape(shlex.join(map(str, start.get("command", ()))))
        items.append(f"<li>{escape(', '.join(facts))}<br><code>{command}</code></li>")
    count = f"{len(starts)} start{'' if len(starts) == 1 else 's'}"
    return folded(count, f"<ol>{''.join(items)}</ol>") if items else ""


def _value(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _curves(report: Report) -> str:
    charts = [
        chart(
            title,
            [Line(name, _points(report, kind, metric)) for name, kind, metric in series],
            _x_label(report),
            percent=title.startswith("Accuracy"),
        )
        for title, series in _SERIES.items()
    ]
    if not any(charts):
        return missing("the run has written no metrics yet")
    return side_by_side(charts) + "<p class=note>The numbers are the last values.</p>"


def _x_label(report: Report) -> str:
    return "step" if report.steps_per_epoch is None else "epoch"


def _points(report: Report, kind: str, metric: str, *place: int) -> list[tuple[float, Any]]:
    """Returns (epoch or step, value) of a metric, or of an entry of a metric that is a list."""
    points = []
    for line in report.metrics:
        if line["kind"] == kind and line.get(metric) is not None:
            value = line[metric]
            for i in place:
                value = value[i]
            points.append((line["step"] / (report.steps_per_epoch or 1), value))
    return points


def _probes(report: Report) -> str:
    """Draws gates and non-locality over training, which earlier versions did not measure."""
    last = {key: value for line in report.metrics for key, value in line.items()}
    x_label, charts = _x_label(report), []
    layers = range(len(last.get("nonlocality", ())))
    lines = [Line(f"layer {i + 1}", _points(report, "eval", "nonlocality", i)) for i in layers]
    title = "Non-locality of each layer, in patches"
    charts.append(chart(title, lines, x_label))
    for i, heads in enumerate(last.get("head_gates", ())):
        lines = [
            Line(f"head {h + 1}", _points(report, "eval", "head_gates", i, h))
            for h in range(len(heads))
        ]
        charts.append(chart(f"Gates of layer {i + 1}", lines, x_label, limits=(0, 1)))
    if not any(charts):
        return missing("no evaluation of this run has measured it (train.probe_images)")
    return side_by_side(charts) + (
        "<p class=note>Measured at each evaluation on a few test images, with the weights that are "
        "trained. A gate is the share of the positional attention of a head.</p>"
    )


def _locality(report: Report) -> str:
    """Shows the gates and the non-locality of every head of the weights."""
    if report.loaded is None:
        return missing(report.no_weights)
    parts = []
    of_layers = np.asarray(gates(report.loaded.params))
    if len(of_layers):
        parts.append(_by_head("Gates: the share of the positional attention", of_layers, 1.0))
    else:
        parts.append("<p>The model has no GPSA layer, and so no gates.</p>")
    if report.tested is None:
        return "".join([*parts, missing(report.not_tested)])
    found = report.tested.nonlocality
    rows, columns = found["grid"]
    blended = np.asarray(found["nonlocality"]["blended"])
    title = f"Non-locality in patches, over {found['images']:,} images"
    parts.append(_by_head(title, blended, math.hypot(rows, columns) / 2))
    parts.append(
        f"<p class=note>Attention to all {rows} x {columns} patches alike has "
        f"{found['uniform']:.2f}.</p>"
    )
    return "".join(parts)


def _by_head(title: str, values: np.ndarray, most: float) -> str:
    head = ("layer", "mean", *(f"head {h + 1}" for h in range(values.shape[1])))
    rows, shades = [], []
    for i, of_layer in enumerate(values):
        shown = [float(of_layer.mean()), *map(float, of_layer)]
        rows.append((f"{i + 1}", *(f"{x:.2f}" for x in shown)))
        shades.append([x / most for x in shown])
    return table(title, head, rows, "numbers", shades)


def _of_tests(report: Report, show: Callable[[Tested], str]) -> str:
    return missing(report.not_tested) if report.tested is None else show(report.tested)


def _maps(tested: Tested) -> str:
    return "".join(map(_map, tested.maps)) + (
        "<p class=note>Columns: the image, with the patch that attends framed in red, the mean of "
        "the heads, and each head. A map runs from black, no attention, to light yellow, its own "
        "maximum.</p>"
    )


def _map(seen: Map) -> str:
    row, column = seen.query
    layers = ", ".join(map(str, seen.layers))
    text = f"{seen.name}: attention of patch {row},{column}; rows are layers {layers}"
    picture = image(seen.picture, text, photo=True)
    # A head stays legible on a phone: a wide picture is scrolled.
    full = seen.picture.width
    style = f"min-width:{full // 2}px;max-width:{full}px"
    return (
        f"<figure><figcaption>{escape(text)}</figcaption>"
        f"{scrolled(f'<div class=map style={style}>{picture}</div>', text)}</figure>"
    )


def _masking(tested: Tested) -> str:
    head = ("masked", "GPSA layers", "top-1", "top-5", "loss")
    rows = [
        (
            result["masked"],
            "" if result["layers"] is None else f"first {result['layers']}",
            f"{result['top1']:.2%}",
            f"{result['top5']:.2%}",
            f"{result['loss']:.4f}",
        )
        for result in tested.masking
    ]
    title = f"Accuracy with parts of the attention masked, on {tested.description}"
    return table(title, head, rows, "numbers")


def _confusion(tested: Tested) -> str:
    classes, matrix = tested.classes, np.asarray(tested.confusion.get("confusion", ()))
    if len(classes) <= _MATRIX and len(matrix):
        shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
        rows = [
            (name, *(f"{n}" if n else "" for n in of_class))
            for name, of_class in zip(classes, matrix.tolist(), strict=True)
        ]
        title = "Images of each class (row) by the class predicted (column)"
        upright = " upright" if max(map(len, classes)) > _UPRIGHT else ""
        return table(title, ("class", *classes), rows, f"numbers matrix{upright}", shares.tolist())
    most = _most_confused(tested)
    if not most:
        return "<p>No image is classified wrongly.</p>"
    return table("The most frequent confusions", ("class", "predicted", "images"), most, "text")


def _most_confused(tested: Tested) -> list[tuple[str, str, str]]:
    """Returns the class, the prediction and the number of images of the most frequent mistakes."""
    names = tested.classes
    if "confusions" in tested.confusion:
        pairs = [
            (of["class"], of["predicted"], of["images"]) for of in tested.confusion["confusions"]
        ]
    else:
        matrix = np.array(tested.confusion["confusion"])
        np.fill_diagonal(matrix, 0)
        places = np.argsort(-matrix, axis=None, kind="stable")[:_CONFUSIONS].tolist()
        pairs = [(names[i // len(names)], names[i % len(names)], matrix.flat[i]) for i in places]
    return [(label, predicted, f"{n:,}") for label, predicted, n in pairs[:_CONFUSIONS] if n]


def _mistakes(tested: Tested) -> str:
    if not tested.mistakes:
        return "<p>No image is classified wrongly.</p>"
    count = tested.masking[0]["images"]
    return (
        f"<p>{tested.wrong:,} of {count:,} images are classified wrongly. These have the largest "
        f"loss:</p><div class=mistakes>{''.join(map(_mistake, tested.mistakes))}</div>"
    )


def _mistake(wrong: Mistake) -> str:
    from PIL import Image

    pixels = wrong.pixels if wrong.pixels.shape[2] == 3 else wrong.pixels[..., 0]
    photo = min(pixels.shape[:2]) >= _PHOTO
    picture = image(Image.fromarray(pixels), f"test image {wrong.name}", photo=photo)
    return (
        f"<figure>{picture}<figcaption><b>{escape(wrong.label)}</b> "
        f"{_share(wrong.probability)}<br>taken for <b>{escape(wrong.predicted)}</b> "
        f"{_share(wrong.predicted_probability)}<br><span class=file>{escape(wrong.name)}</span>"
        "</figcaption></figure>"
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if not 0 < value < 0.0005 else "&lt;0.1%"
