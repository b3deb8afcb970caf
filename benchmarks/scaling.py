"""Keeps the measurements over resolutions as JSON, and draws them.

    python -m benchmarks.scaling

This draws benchmarks/scaling.png again from benchmarks/scaling.json. `python -m benchmarks.model`
measures, and writes both files.
"""

import json
import pathlib
from typing import Any

import numpy as np

Record = dict[str, Any]

PICTURE = pathlib.Path(__file__).with_name("scaling.png")

# The keys that say what a record is about; its other keys are measurements.
_KEY = ("variant", "batch", "dtype", "device", "who", "image_size")

# The panels, from left to right.
_TITLES = {"seconds": "seconds", "peak_bytes": "peak memory above the model, GB"}

# Okabe and Ito's palette, which colour-blind readers can tell apart; timm is black. Lines also
# differ by marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "os^Dv<"


def merge(path: pathlib.Path, records: list[Record]) -> list[Record]:
    """Adds records to a file, in which they replace older measurements, and returns all records."""
    old = json.loads(path.read_text()) if path.exists() else []
    merged: dict[str, Record] = {}
    for record in [*old, *records]:
        key = str([str(record[name]) for name in _KEY[:-1]] + list(record["image_size"]))
        merged[key] = merged.get(key, {}) | record
    result = sorted(merged.values(), key=lambda r: [str(r[n]) for n in _KEY[:-1]] + [_pixels(r)])
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def like(subject: Record, records: list[Record]) -> list[Record]:
    """Returns the records with the same model, batch, type and device as `subject`."""
    return [r for r in records if all(r[name] == subject[name] for name in _KEY[:-2])]


def draw(records: list[Record], path: pathlib.Path) -> None:
    """Draws time and peak memory of a forward pass over the image's side, on logarithmic axes.

    Raises:
      ValueError: if the records differ in model, batch, type or device.
      ImportError: if matplotlib is not installed (pip install '.[benchmarks]').
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    subjects = {tuple(record[name] for name in _KEY[:-2]) for record in records}
    if len(subjects) != 1:
        raise ValueError(f"expected one model, batch, dtype and device, got {subjects}")
    ((variant, batch, dtype, device),) = subjects
    names = sorted({r["who"] for r in records}, key=lambda who: (not who.startswith("timm"), who))
    ours = [who for who in names if not who.startswith("timm")]
    measured = [key for key in _TITLES if any(_positive(r, key) for r in records)]
    figure, panels = pyplot.subplots(
        1,
        len(measured),
        figsize=(max(7, 5 * len(measured)), 4.2),
        layout="constrained",
        squeeze=False,
    )
    for panel, key in zip(panels[0], measured, strict=True):
        for who in names:
            style = {"color": "black", "marker": "x", "linestyle": "-" if who == "timm" else ":"}
            if who in ours:
                index = ours.index(who) % len(_COLOURS)
                style = {"color": _COLOURS[index], "marker": _MARKERS[index]}
            curve = [(_pixels(r), r[key]) for r in records if r["who"] == who and _positive(r, key)]
            sizes = [size for size, _ in curve]
            if key == "seconds":
                low, median, high = np.reshape([y for _, y in curve], (-1, 3)).T
                panel.plot(sizes, median, label=who, **style)
                panel.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
            else:
                panel.plot(sizes, [y / 1e9 for _, y in curve], label=who, **style)
        panel.set(xscale="log", yscale="log", xlabel="image, pixels a side", title=_TITLES[key])
        panel.xaxis.set_major_locator(ticker.FixedLocator(sorted({_pixels(r) for r in records})))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.grid(alpha=0.3, which="both")
    panels[0][0].legend().set_in_layout(False)  # a long name must not squeeze the panels
    images = "image" if batch == 1 else "images"
    figure.suptitle(f"Forward pass of {variant}, {batch} {images}, {dtype}, on {device}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _positive(record: Record, key: str) -> bool:
    """Whether a value was measured and is positive, so that a logarithmic axis can show it."""
    return bool(np.all(np.greater(record.get(key) or 0, 0)))


def _pixels(record: Record) -> float:
    """Returns the side of a square with as many pixels as the image."""
    height, width = record["image_size"]
    return (height * width) ** 0.5


if __name__ == "__main__":
    draw(json.loads(PICTURE.with_suffix(".json").read_text()), PICTURE)
