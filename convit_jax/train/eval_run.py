"""Runs an evaluation and writes its results at each image size, as a table and into files."""

from collections.abc import Iterable, Iterator
import contextlib
import json
import logging
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import tqdm

from convit_jax.data import transforms
from convit_jax.data.chunks import Batch, EvalChunks
from convit_jax.data.source import describe
from convit_jax.data.workers import iterate
from convit_jax.model.network import ConViT
from convit_jax.model.variants import variant_of
from convit_jax.parallel import processes, sharding
from convit_jax.parallel.signals import Interruption
from convit_jax.storage import write_text
from convit_jax.train import evaluation
from convit_jax.train.eval_setup import EvalRun
from convit_jax.weights import adapt
from convit_jax.workdir import identity

log = logging.getLogger(__name__)

_SECONDS_A_LINE = 10.0


def run(prepared: EvalRun) -> dict[str, Any] | None:
    """Evaluates at every size, prints a table, and writes the results into the working directory.

    Args:
      prepared: the evaluation, from `eval_setup.prepare`.

    Returns:
      The contents of `eval.json`; None if the evaluation was interrupted and nothing was written.

    Raises:
      OSError: if the results cannot be written.
      convit_jax.data.corrupt.ImageError: if an image is corrupt or does not fit the configuration.
    """
    log.info("data: %s", describe(prepared.source))
    results, lines = [], []
    with Interruption() as interruption:
        for model in prepared.models:
            result = _evaluate(prepared, model, interruption)
            if result is None:
                log.info("stopped: no results were written")
                return None
            labels, best = result.pop("label", None), result.pop("predictions", None)
            evaluated = result.pop("evaluated", ())
            results.append(result)
            if best is not None:
                size = result["image_size"]
                lines += [
                    {"image_size": size, "index": i, "label": int(label), "top5": row.tolist()}
                    for i, (label, row) in enumerate(zip(labels, best, strict=True))
                    if evaluated[i]
                ]
    report = _report(prepared, results)
    if processes.is_main():
        print(table(results), flush=True)
        if prepared.workdir is not None:
            _write(prepared.workdir.evaluation, json.dumps(report, indent=2) + "\n")
            if prepared.choices.predictions:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                _write(prepared.workdir.predictions, text)
    return report


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as a text table with one line for each size."""
    rows = [
        (
            "{} x {}".format(*result["image_size"]),
            f"{result['top1']:.3%}",
            f"{result['top5']:.3%}",
            f"{result['loss']:.4f}",
            f"{result['images']:,}",
            f"{result['images_per_second']:.1f}",
        )
        for result in results
    ]
    rows.insert(0, ("image", "top-1", "top-5", "loss", "images", "images/s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _evaluate(
    prepared: EvalRun, model: ConViT, interruption: Interruption
) -> dict[str, Any] | None:
    """Evaluates a model at its image size; None if the evaluation was interrupted."""
    config, mesh, size = prepared.config, prepared.mesh, model.image_shape[:2]
    params = adapt.fit_params(
        prepared.loaded.params,
        model,
        new_head=False,
        resize_pos_embed=True,
        adapt_channels=False,
        grid=prepared.loaded.model.grid,
    )
    params = jax.device_put(params, sharding.replicated(mesh))
    step = evaluation.make_eval_step(
        model, config.data.mean, config.data.std, mesh, prepared.choices.predictions
    )
    start = time.perf_counter()
    batch = _abstract_batch(prepared.share.batch_size, model, mesh)
    compiled = step.lower(params, batch).compile()
    log.info("%d x %d: compiled in %.1f s", *size, time.perf_counter() - start)
    transform = transforms.EvalTransform(size, config.augment.eval_crop)
    chunks = EvalChunks(prepared.source, transform, prepared.share, config.data.skip_corrupt)
    start = time.perf_counter()
    with contextlib.closing(iterate(chunks, workers=prepared.workers)) as batches:
        watched = _watch(batches, len(prepared.source), prepared.share.batch_size)
        result = evaluation.evaluate(
            compiled, {"": params}, watched, mesh, len(prepared.source), interruption.requested
        )
    if result is None:
        return None
    rate = result["images"] / (time.perf_counter() - start)
    return {"image_size": list(size), **result, "images_per_second": rate}


def _abstract_batch(batch_size: int, model: ConViT, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {
        "image": ((batch_size, *model.image_shape), jnp.uint8),
        "label": ((batch_size,), jnp.int32),
        "mask": ((batch_size,), jnp.float32),
    }
    over = sharding.over_batch(mesh)
    return {k: jax.ShapeDtypeStruct(*v, sharding=over) for k, v in shapes.items()}


def _watch(batches: Iterable[Batch], total: int, size: int) -> Iterator[Batch]:
    """Yields the batches and shows progress: a bar on a terminal, else a log line now and then."""
    start = said = time.perf_counter()
    bar = tqdm.tqdm(
        total=total,
        unit="image",
        leave=False,
        disable=not (processes.is_main() and sys.stderr.isatty()),
    )
    with bar:
        for number, batch in enumerate(batches):
            yield batch
            done, now = min(total, (number + 1) * size), time.perf_counter()
            bar.update(done - bar.n)
            if bar.disable and now - said > _SECONDS_A_LINE:
                rate = done / (now - start)
                log.info("%s of %s images  %.1f images/s", f"{done:,}", f"{total:,}", rate)
                said = now


def _report(prepared: EvalRun, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the contents of `eval.json`; numbers that are not finite become None, JSON's null."""
    config, loaded = prepared.config, prepared.loaded
    return {
        "weights": loaded.source,
        "step": loaded.step,
        "ema": prepared.choices.ema,
        "model": variant_of(loaded.model) or "none of the paper's",
        "data": describe(prepared.source),
        "crop_pct": config.augment.eval_crop,
        "results": [
            {k: v if k == "image_size" or math.isfinite(v) else None for k, v in result.items()}
            for result in results
        ],
        "dtype": jnp.dtype(prepared.models[0].dtype).name,
        "batch_size": prepared.share.batch_size,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": dict(identity.versions()),
    }


def _write(path: pathlib.Path, text: str) -> None:
    write_text(path, text)
    log.info("wrote %s", path)
