"""Runs an evaluation at each image size and writes its results."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import json
import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import tqdm

from convit_jax.data.batches.chunks import Batch, EvalChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.data.fit import reading
from convit_jax.data.images import transforms
from convit_jax.data.source import describe
from convit_jax.model.network import ConViT
from convit_jax.parallel import processes, sharding
from convit_jax.parallel.signals import Interruption
from convit_jax.storage import write_text
from convit_jax.train import eval_report, evaluation
from convit_jax.train.eval_setup import EvalRun
from convit_jax.train.metrics import shows_bars
from convit_jax.weights import adapt
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

_SECONDS_A_LINE = 10.0


def run(prepared: EvalRun) -> dict[str, Any] | None:
    """Evaluates at every size, prints tables, and writes the results into the working directory.

    Args:
      prepared: the evaluation, from `eval_setup.prepare`.

    Returns:
      The contents of `eval.json`; None if the evaluation was interrupted and nothing was written.

    Raises:
      OSError: if the results cannot be written.
      convit_jax.data.corrupt.ImageError: if an image is corrupt or does not fit the configuration.
    """
    log.info("data: %s", describe(prepared.source))
    classes, results, rows = prepared.classes, [], []
    with Interruption() as interruption:
        for model in prepared.models:
            result = _evaluate(prepared, model, interruption)
            if result is None:
                log.info("stopped: no results were written")
                return None
            arrays = {k: result.pop(k) for k in list(result) if isinstance(result[k], np.ndarray)}
            per_image = eval_report.of_evaluated(arrays)
            result["by_class"] = eval_report.by_class(per_image, classes)
            results.append(result | eval_report.confusion(per_image, classes))
            rows.append(per_image)
    report = eval_report.contents(prepared, results)
    if processes.is_main():
        print(eval_report.tables(results, classes), flush=True)
        if prepared.workdir is not None:
            _write(prepared.workdir.evaluation, eval_report.to_json(report))
            if prepared.choices.predictions:
                _write_predictions(prepared, prepared.workdir, rows)
    return report


def _evaluate(
    prepared: EvalRun, model: ConViT, interruption: Interruption
) -> dict[str, Any] | None:
    """Evaluates a model at its image size; None if the evaluation was interrupted."""
    start = time.perf_counter()
    result, compiling = evaluate_each(
        prepared, model, lambda params: {"": params}, interruption, predictions=True
    )
    if result is None:
        return None
    rate = result["images"] / (time.perf_counter() - start - compiling)
    return {"image_size": list(model.image_shape[:2]), **result, "images_per_second": rate}


def evaluate_each(
    prepared: EvalRun,
    model: ConViT,
    make: Callable[[dict[str, Any]], dict[str, Any]],
    interruption: Interruption,
    predictions: bool = False,
) -> tuple[dict[str, Any] | None, float]:
    """Evaluates several versions of the weights, each on every image, and reads each image once.

    Args:
      prepared: the evaluation, from `eval_setup.prepare`.
      model: one of its models.
      make: returns {prefix: parameters} for the parameters of the model. Arrays that the versions
        share are put on the devices once.
      interruption: the requests to stop.
      predictions: whether to return predictions, see `evaluation.make_eval_step`.

    Returns:
      The results of `evaluation.evaluate`, None if it was interrupted; and the seconds that reading
      no images took: compilation and the transfer of the weights.
    """
    start = time.perf_counter()
    config, mesh, size = prepared.config, prepared.mesh, model.image_shape[:2]
    params = adapt.fit_params(
        prepared.loaded.params,
        model,
        new_head=False,
        resize_pos_embed=True,
        adapt_channels=False,
        grid=prepared.loaded.model.grid,
    )
    versions = _put_once(make(params), mesh)
    classes = None if prepared.classes.is_identity else prepared.classes.logits
    step = evaluation.make_eval_step(
        model, config.data.mean, config.data.std, mesh, predictions, classes
    )
    batch = _abstract_batch(prepared.share.batch_size, model, mesh)
    compiled = step.lower(next(iter(versions.values())), batch).compile()
    seconds = time.perf_counter() - start
    log.info("%d x %d: compiled in %.1f s", *size, seconds)
    transform = transforms.EvalTransform(
        size, config.augment.eval_crop, model.in_channels == 1, reading(config)
    )
    chunks = EvalChunks(prepared.source, transform, prepared.share, config.data.skip_corrupt)
    total = len(prepared.source)
    with contextlib.closing(iterate(chunks, workers=prepared.workers)) as batches:
        watched = _watch(batches, total, prepared.share.batch_size)
        result = evaluation.evaluate(
            compiled, versions, watched, mesh, total, interruption.requested
        )
    return result, seconds


def _put_once(tree: Any, mesh: Mesh) -> Any:
    """Puts the arrays of a tree on all devices; an array that occurs several times, once."""
    put: dict[int, jax.Array] = {}

    def of(leaf: Any) -> jax.Array:
        if id(leaf) not in put:
            put[id(leaf)] = jax.device_put(leaf, sharding.replicated(mesh))
        return put[id(leaf)]

    return jax.tree.map(of, tree)


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
        disable=not (processes.is_main() and shows_bars()),
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


def _write_predictions(
    prepared: EvalRun, workdir: Workdir, rows: Sequence[eval_report.PerImage]
) -> None:
    indices = sorted({int(i) for per_image in rows for i in per_image["index"]})
    names = eval_report.image_names(prepared.source, indices, str(workdir.index))
    lines = (
        line
        for model, per_image in zip(prepared.models, rows, strict=True)
        for line in eval_report.predictions(
            model.image_shape[:2], per_image, names, prepared.classes
        )
    )
    _write(workdir.predictions, "".join(json.dumps(line) + "\n" for line in lines))


def _write(path: pathlib.Path, text: str) -> None:
    write_text(path, text)
    log.info("wrote %s", path)
