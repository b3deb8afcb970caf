"""What `convit analyse` prints: the measurements of `measured` as text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from convit_jax.train.eval_report import columns


def gates(found: dict[str, Any]) -> str:
    """Returns a line for each GPSA layer: the mean gate, and the gate of each head."""
    title = "gates: the share of the positional attention in each head"
    return f"{title}\n{_by_head(range(1, len(found['gates']) + 1), found['gates'])}"


def nonlocality(found: dict[str, Any]) -> str:
    """Returns a line for each layer: the means over the heads of each part, and each head."""
    parts = found["nonlocality"]
    blended, positional = parts["blended"], parts.get("positional", [])
    rows = [("layer", "kind", "mean", "content", "positional", *_heads(blended))]
    for i, of_layer in enumerate(blended):
        gpsa = i < len(positional)
        rows.append(
            (
                f"{i + 1}",
                "GPSA" if gpsa else "plain",
                f"{np.mean(of_layer):.2f}",
                f"{np.mean(parts['content'][i]):.2f}",
                f"{np.mean(positional[i]):.2f}" if gpsa else "",
                *(f"{x:.2f}" for x in of_layer),
            )
        )
    title = (
        "non-locality: the mean distance of attention in patches, over "
        f"{found['images']:,} images and {_grid(found)} patches"
    )
    last = f"attention to all patches alike: {found['uniform']:.2f}"
    return f"{title}\n{columns(rows)}\n{last}"


def maps(found: dict[str, Any]) -> str:
    """Returns a table for each image and query: the mean distance of the attention of each head."""
    kind = "attention" if found["part"] == "blended" else f"{found['part']} attention"
    texts = []
    for seen in found["maps"]:
        row, column = seen["query"]
        title = (
            f"{seen['image']}: mean distance of the {kind} of patch {row},{column} of "
            f"{_grid(found)}, in patches"
        )
        texts.append(f"{title}\n{_by_head(found['layers'], seen['distance'])}")
    return "\n\n".join(texts)


def masking(found: dict[str, Any]) -> str:
    """Returns a line for each masking: top-1, top-5, the loss and the number of images."""
    rows = [("masked", "GPSA layers", "top-1", "top-5", "loss", "images")]
    for result in found["results"]:
        layers = result["layers"]
        rows.append(
            (
                result["masked"],
                "" if layers is None else f"first {layers}",
                f"{result['top1']:.3%}",
                f"{result['top5']:.3%}",
                f"{result['loss']:.4f}",
                f"{result['images']:,}",
            )
        )
    return columns(rows)


def _by_head(layers: Sequence[int], values: Sequence[Sequence[float]]) -> str:
    """Returns a line for each layer with the mean over its heads, and each head."""
    rows = [("layer", "mean", *_heads(values))]
    for layer, of_layer in zip(layers, values, strict=True):
        rows.append((f"{layer}", f"{np.mean(of_layer):.2f}", *(f"{x:.2f}" for x in of_layer)))
    return columns(rows)


def _heads(values: Sequence[Sequence[float]]) -> list[str]:
    return [f"head {number}" for number in range(1, len(values[0]) + 1)]


def _grid(found: dict[str, Any]) -> str:
    return "{} x {}".format(*found["grid"])
