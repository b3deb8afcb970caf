"""Pictures of the measurements of `measured`. They need matplotlib, which is imported late."""

from collections.abc import Sequence
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from convit_jax import extras
from convit_jax.storage import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gates(found: dict[str, Any]) -> "Figure":
    """Draws the gate of each head over the GPSA layers, and their mean (figure 6).

    The dotted line is where the gates start unless model.gate_init says otherwise.
    """
    figure, axes = _figure()
    _dots(axes, found["gates"], "mean of the heads")
    axes.axhline(1 / (1 + np.exp(-1)), color="0.7", linestyle=":", label="sigmoid(1)")
    axes.set(xlabel="layer", ylabel="gate: share of the positional attention", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


def nonlocality(found: dict[str, Any]) -> "Figure":
    """Draws the non-locality of each head over the layers, and the mean of each part (figure 5)."""
    figure, axes = _figure()
    parts = found["nonlocality"]
    _dots(axes, parts["blended"], "mean of the heads")
    gpsa = len(parts.get("positional", ()))
    for name, style in (("content", "--"), ("positional", "-.")):
        if gpsa:
            means = np.mean(parts[name][:gpsa], axis=1)
            axes.plot(range(1, gpsa + 1), means, style, color="0.4", label=f"{name} part")
    axes.axhline(found["uniform"], color="0.7", linestyle=":", label="all patches alike")
    axes.set(xlabel="layer", ylabel="non-locality in patches", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def masking(found: dict[str, Any]) -> "Figure":
    """Draws the top-1 accuracy of each masking as a bar (Tables 5 and 6)."""
    results = found["results"]
    figure, axes = _figure(1 + 0.35 * len(results))
    names = [
        r["masked"] if r["layers"] is None else f"{r['masked']}, first {r['layers']}"
        for r in results
    ]
    bars = axes.barh(names, [100 * r["top1"] for r in results])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="top-1 accuracy in %", xlim=(0, 110))
    axes.set_title("masked", loc="left", fontsize="medium")
    return figure


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a picture as PNG.

    Raises:
      OSError: if the file cannot be written.
    """
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _figure(height: float = 3.6) -> "tuple[Figure, Axes]":
    with extras.needed("study", "a picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dots(axes: "Axes", values: Sequence[Sequence[float]], label: str) -> None:
    """Draws a dot for each head over the layers, counted from 1, and a line through the means."""
    layers = np.arange(1, len(values) + 1)
    heads = np.asarray(values)
    axes.plot(layers, heads, "o", color="tab:blue", markersize=4, alpha=0.5)
    axes.plot(layers, heads.mean(axis=1), color="tab:blue", label=label)
    axes.set_xticks(layers)
