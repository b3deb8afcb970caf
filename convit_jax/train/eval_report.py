"""What an evaluation reports: tables for the terminal, the content of its files."""

from collections.abc import Iterator, Mapping, Sequence
import json
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.data import threads
from convit_jax.data.class_mapping import ClassMapping
from convit_jax.data.source import Source, describe
from convit_jax.model.variants import variant_of
from convit_jax.train.eval_setup import EvalRun
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir import record

PerImage = dict[str, np.ndarray]  # arrays (images, ...), see `of_evaluated`

_PRINTED = 20  # most classes whose accuracy is printed
_MATRIX = 200  # most classes whose confusion matrix is written
_CONFUSIONS = 100  # most confusions that are written for more classes


def of_evaluated(arrays: dict[str, np.ndarray]) -> PerImage:
    """Returns the results of the images that were evaluated, and "index", their places in the data.

    Args:
      arrays: arrays (images, ...), see `evaluation.make_eval_step`. The images where "evaluated" is
        False are corrupt, and are left out.
    """
    chosen = np.flatnonzero(arrays["evaluated"])
    return {"index": chosen, **{key: values[chosen] for key, values in arrays.items()}}


def by_class(per_image: PerImage, classes: ClassMapping) -> list[dict[str, Any]]:
    """Returns the accuracy of each class that is evaluated, in the order of the data.

    Each has "class", "images", and the shares "top1" and "top5" in [0, 1], None without images.
    """
    labels, rank = per_image["label"], per_image["rank"]
    hits = {"top1": rank == 1, "top5": (rank >= 1) & (rank <= 5)}
    images, *right = (
        np.bincount(labels[chosen], minlength=len(classes.logits))
        for chosen in (np.ones(len(labels), bool), *hits.values())
    )
    return [
        {
            "class": classes.names[i],
            "images": int(images[i]),
            **{
                name: float(count[i] / images[i]) if images[i] else None
                for name, count in zip(hits, right, strict=True)
            },
        }
        for i in classes.kept
    ]


def confusion(per_image: PerImage, classes: ClassMapping) -> dict[str, Any]:
    """Returns how often which class was taken for which.

    Up to 200 classes this is "confusion", a matrix with a row for each class and a column for each
    prediction, in the order of `by_class`. For more classes it is "confusions", the 100 most
    frequent mistakes, the most frequent first.
    """
    kept = np.asarray(classes.kept)
    size = len(classes.logits)
    place = per_image["label"] * size + per_image["predictions"][:, 0]
    if len(kept) <= _MATRIX:
        matrix = np.bincount(place, minlength=size * size).reshape(size, size)
        return {"confusion": matrix[np.ix_(kept, kept)].tolist()}
    pairs, counts = np.unique(place, return_counts=True)
    label, predicted = pairs // size, pairs % size
    wrong = label != predicted
    order = np.argsort(-counts[wrong], kind="stable")[:_CONFUSIONS]
    return {
        "confusions": [
            {
                "class": classes.names[label[wrong][i]],
                "predicted": classes.names[predicted[wrong][i]],
                "images": int(counts[wrong][i]),
            }
            for i in order
        ]
    }


def tables(results: Sequence[dict[str, Any]], classes: ClassMapping) -> str:
    """Returns the results as text: a line for each size, then one for each class.

    There are no lines for the classes if there are more than 20. If some of the weights' classes
    are left out, a line says so.
    """
    sizes = ["{} x {}".format(*result["image_size"]) for result in results]
    rows = [
        (
            size,
            f"{result['top1']:.3%}",
            f"{result['top5']:.3%}",
            f"{result['loss']:.4f}",
            f"{result['images']:,}",
            f"{result['images_per_second']:.1f}",
        )
        for size, result in zip(sizes, results, strict=True)
    ]
    text = columns([("image", "top-1", "top-5", "loss", "images", "images/s"), *rows])
    if len(classes.kept) < classes.num_logits:
        text += f"\n{subset(classes)}"
    if len(classes.kept) > _PRINTED:
        return text
    head = ("images", *(f"top-1 {size}" if len(sizes) > 1 else "top-1" for size in sizes), "class")
    rows = [
        (
            f"{of_sizes[0]['images']:,}",
            *("" if c["top1"] is None else f"{c['top1']:.3%}" for c in of_sizes),
            of_sizes[0]["class"],
        )
        for of_sizes in zip(*(result["by_class"] for result in results), strict=True)
    ]
    return f"{text}\n\n{columns([head, *rows])}"


def subset(classes: ClassMapping) -> str:
    """Returns a line that says over how many of the weights' classes the results are."""
    return (
        f"over the {len(classes.kept):,} classes of the data; the weights' other "
        f"{classes.num_logits - len(classes.kept):,} are left out"
    )


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Returns rows of cells as aligned lines. A last column "class" is aligned left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = rows[0][-1] == "class"

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([*cells[:-1], row[-1] if left else cells[-1]])

    return "\n".join(map(line, rows))


def predictions(
    size: Sequence[int], per_image: PerImage, names: Mapping[int, str], classes: ClassMapping
) -> Iterator[dict[str, Any]]:
    """Yields a line of `predictions.jsonl` for each image.

    The numbers of classes are those of the weights' logits.

    Args:
      size: (height, width) in pixels.
      per_image: results of each image.
      names: {index: name} of the images.
      classes: the classes of the data.
    """
    logits, shown = np.asarray(classes.logits), classes.names
    columns = (per_image[key] for key in ("index", "label", "predictions", "probabilities"))
    for i, label, best, shares in zip(*columns, strict=True):
        yield {
            "image_size": list(size),
            "index": int(i),
            "file": names[int(i)],
            "label": int(logits[label]),
            "label_name": shown[label],
            "top5": logits[best].tolist(),
            "top5_names": [shown[k] for k in best],
            "probabilities": [_finite(round(float(share), 6)) for share in shares],
        }


def image_names(source: Source, indices: Sequence[int], cache_dir: str | None) -> dict[int, str]:
    """Returns {index: name} of some images, from the data set's list of names if it has one."""
    try:
        names = source.names_and_labels(cache_dir)[0]
        return {i: names[i].decode(errors="replace") for i in indices}
    except ValueError:  # the data set has no file names, or some of its images cannot be read

        def name(index: int) -> str:
            return str(source[index]["name"])

        found = threads.in_threads("Reading names", "images", name, indices)
        return dict(zip(indices, found, strict=True))


def of_weights(loaded: Loaded) -> dict[str, Any]:
    """Returns what weights are and where they are from, as JSON types."""
    return {
        "weights": loaded.source,
        "step": loaded.step,
        "ema": loaded.ema,
        "chosen": loaded.chosen or "the weights named",
        "model": variant_of(loaded.model) or "none of the paper's",
    }


def contents(prepared: EvalRun, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the contents of `eval.json`; numbers that are not finite become None, JSON's null."""
    config, loaded, classes = prepared.config, prepared.loaded, prepared.classes
    return {
        **of_weights(loaded),
        "data": describe(prepared.source),
        "classes": f"{len(classes.kept):,} of the weights' {classes.num_logits:,}, {classes.how}",
        "crop_pct": config.augment.eval_crop,
        "results": [{key: _finite(value) for key, value in result.items()} for result in results],
        "dtype": jnp.dtype(prepared.models[0].dtype).name,
        "batch_size": prepared.share.batch_size,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": dict(record.versions()),
    }


def to_json(contents: dict[str, Any]) -> str:
    """Returns JSON with a line for each innermost list or object, such as a row of a matrix."""
    text = json.dumps(contents, indent=2)
    inner = r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])"  # a string has no line breaks in JSON
    return re.sub(inner, lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
