"""The run of `main.py --mode=eval`: what is evaluated, on which images, and what is left of it."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import tqdm

from convit_jax import (
    augment,
    class_names,
    data,
    distributed,
    evaluate,
    fit,
    model_options,
    sharding,
    sources,
    startup,
    weights,
    workdir,
)
from convit_jax.interruption import Interruption
from convit_jax.model import ConViT

log = logging.getLogger(__name__)

_BATCH_A_DEVICE = 128  # images at most: more are no faster, and need memory
_SECONDS_A_LINE = 10.0

# What a configuration has to say as the weights do. What is missing here is of training only, or
# changes how the same function is computed.
_OF_THE_MODEL = (
    "image_size", "patch_size", "in_channels", "num_classes", "embed_dim", "depth", "num_heads",
    "mlp_ratio", "qkv_bias", "qk_scale", "local_up_to_layer", "use_pos_embed", "cls_pos_embed",
    "global_pool",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of an evaluation.

    Attributes:
      checkpoint: of a run: "best" by top-1, "newest", or a step.
      ema: whether to evaluate the averaged weights.
      sizes: (height, width) of the images, in turn; () is the model's own.
      predictions: whether to write those of every image.
    """

    checkpoint: str = "best"
    ema: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    predictions: bool = False


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """What an evaluation works on."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path | None
    options: Options
    mesh: Mesh
    loaded: weights.Loaded
    models: tuple[ConViT, ...]  # one for each size, the same but for it
    source: sources.Source
    share: data.Share
    workers: int


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """ "160,224x320" -> ((160, 160), (224, 320)): height x width.

    Raises:
      ValueError: if it is something else.
    """
    parts = [re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip()) for part in text.split(",") if text]
    if not all(parts):
        raise ValueError(
            f"--eval_size: expected sizes in pixels such as 160,224,224x320 (height x width), got "
            f"{text!r}"
        )
    return tuple((int(part[1]), int(part[2] or part[1])) for part in parts)


def prepare(
    config: ml_collections.ConfigDict | None, folder: str | None, options: Options
) -> EvalRun:
    """Reads the weights and opens the data; compiles nothing.

    If the working directory holds a run, that is evaluated, and its own config.json is the
    configuration where none is given. Else it is `config.init_from`.

    Args:
      config: see `configs/common.py`; None: of the run.
      folder: the working directory, for the result; None: there is none.
      options: the flags.

    Raises:
      ValueError: if there is nothing to evaluate, or weights, configuration and data do not fit.
      OSError: if the weights or the data are not there, or the directory cannot be written.
    """
    path = pathlib.Path(folder) if folder else None
    if options.predictions and path is None:
        raise ValueError("--predictions: expected --workdir, the folder to write them into")
    mesh = sharding.make_mesh()
    config, loaded = _weights(config, path, options)
    cache = str(path / "index") if path else None
    source = startup.open_source(config, "test", cache_dir=cache)
    model = startup.make_model(config, loaded.model.num_classes)
    _check_model(model, loaded, any_size=bool(options.sizes))
    _check_data(config, model, loaded, source)
    models = tuple(model.clone(image_size=size) for size in options.sizes) or (model,)
    if path is not None:
        distributed.check_shared_folder(path)
    batch_size = _batch_size(config.train.batch_size, len(source), mesh.size)
    return EvalRun(
        config=config,
        workdir=path,
        options=options,
        mesh=mesh,
        loaded=loaded,
        models=models,
        source=source,
        share=data.Share(batch_size, jax.process_index(), jax.process_count()),
        workers=data.num_workers(config.data.workers, source),
    )


def run(prepared: EvalRun) -> dict[str, Any] | None:
    """Evaluates at every size, shows a table, and writes `eval.json` into the working directory.

    Returns:
      What is written there; None if it was interrupted, and nothing was written.

    Raises:
      OSError: if the result cannot be written.
      data.CorruptImageError: at an image that cannot be decoded.
    """
    log.info("data: %s", sources.describe(prepared.source))
    results, lines = [], []
    with Interruption() as interruption:
        for model in prepared.models:
            result = _evaluate(prepared, model, interruption)
            if result is None:
                log.info("stopped: nothing was written")
                return None
            labels, best = result.pop("label", None), result.pop("predictions", None)
            results.append(result)
            if best is not None:
                size = result["image_size"]
                lines += [
                    {"image_size": size, "index": i, "label": int(label), "top5": row.tolist()}
                    for i, (label, row) in enumerate(zip(labels, best, strict=True))
                ]
    report = _report(prepared, results)
    if distributed.is_main():
        print(table(results), flush=True)
        if prepared.workdir is not None:
            _write(prepared.workdir / "eval.json", json.dumps(report, indent=2) + "\n")
        if prepared.options.predictions:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            _write(prepared.workdir / "predictions.jsonl", text)
    return report


def table(results: list[dict[str, Any]]) -> str:
    """Results as lines of text, one a size."""
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


def _weights(
    config: ml_collections.ConfigDict | None, path: pathlib.Path | None, options: Options
) -> tuple[ml_collections.ConfigDict, weights.Loaded]:
    """The configuration, and the weights of the run in the working directory or of init_from."""
    saved = workdir.load_config(path) if path else None
    if saved is not None:
        if config is not None and config.init_from and config.init_from != saved.init_from:
            raise ValueError(
                f"init_from: {path} holds a run, which would be evaluated, not "
                f"{config.init_from}: choose another --workdir for the result"
            )
        loaded = weights.read(path, ema=options.ema, checkpoint=options.checkpoint)
        return config or saved, loaded
    if config is None or not config.init_from:
        there = f"{path} holds no run (config.json)" if path else "no --workdir of a run is given"
        raise ValueError(
            f"nothing to evaluate: {there}, nor weights: --config=FILE --config.init_from=WEIGHTS"
        )
    # No shape tells the heads of a DeiT: the configuration says what is expected.
    model = startup.make_model(config)
    heads = {} if model.local_up_to_layer else {"num_heads": model.num_heads}
    ema = options.ema or config.init_ema
    return config, weights.read(config.init_from, ema=ema, **heads)


def _check_model(model: ConViT, loaded: weights.Loaded, any_size: bool) -> None:
    """Raises ValueError naming every key of the model that is not as the weights have it."""
    found = loaded.model
    problems = []
    for key in _OF_THE_MODEL:
        values = getattr(model, key), getattr(found, key)
        if key == "image_size":
            if any_size or not found.use_pos_embed:
                continue
            values = model.image_shape[:2], found.image_shape[:2]
        if values[0] != values[1]:
            said = "x".join(map(str, values[0])) if key == "image_size" else values[0]
            has = "x".join(map(str, values[1])) if key == "image_size" else values[1]
            problems.append(f"model.{key}: the configuration says {said}, the weights {has}")
            if key == "image_size":
                problems[-1] += f" (--eval_size={said} interpolates the position embedding)"
    if problems:
        variant = model_options.variant_of(found) or "none of the paper's"
        raise ValueError(
            f"the configuration's model is not that of {loaded.source}, which is {variant}:\n  "
            + "\n  ".join(problems)
            + ("\nWithout --config a run is evaluated by its own." if loaded.step else "")
        )


def _check_data(
    config: ml_collections.ConfigDict,
    model: ConViT,
    loaded: weights.Loaded,
    source: sources.Source,
) -> None:
    name, image = config.data.source, source[0]["image"]
    if not model.num_classes or model.global_pool == "none":
        raise ValueError(
            f"{loaded.source}: evaluating needs logits for an image: expected a head and "
            f"global_pool token or avg, got num_classes={model.num_classes} and "
            f"global_pool={model.global_pool}"
        )
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"data.source: {name} has {source.num_classes:,} classes, {loaded.source} "
            f"{model.num_classes:,}"
        )
    if loaded.class_names is not None:
        pairs = (
            class_names.readable(names, model.num_classes)
            for names in (source.class_names, loaded.class_names)
        )
        for number, (there, known) in enumerate(zip(*pairs, strict=True)):
            if there != known:
                raise ValueError(
                    f"data.source: class {number} of {name} is {there!r}, that of "
                    f"{loaded.source} {known!r}: the same classes in the same order are needed"
                )
    channels = 3 if isinstance(image, bytes) else image.shape[-1]
    if channels != model.in_channels:
        raise ValueError(
            f"model.in_channels: expected {channels} as in {name}, got {model.in_channels}"
        )
    for key in ("mean", "std"):
        if len(config.data[key]) != channels:
            raise ValueError(f"data.{key}: expected {channels} values, got {config.data[key]}")
    _warn_of_other_preprocessing(config, loaded)


def _warn_of_other_preprocessing(config: ml_collections.ConfigDict, loaded: weights.Loaded) -> None:
    """Says where the configuration prepares images otherwise than the weights were said to want."""
    chosen = {
        "mean": ("data.mean", tuple(config.data.mean)),
        "std": ("data.std", tuple(config.data.std)),
        "crop_pct": ("augment.eval_crop", config.augment.eval_crop),
    }
    for field in dataclasses.fields(loaded):
        known = getattr(loaded, field.name)
        # The default stands for "not said" too.
        if field.name in chosen and known not in (field.default, chosen[field.name][1]):
            key, value = chosen[field.name]
            log.warning("%s is %s; %s says %s", key, value, loaded.source, known)


def _batch_size(wanted: int, num_images: int, devices: int) -> int:
    """A multiple of the devices: no result depends on it (but for the order of sums)."""
    wanted = min(wanted, _BATCH_A_DEVICE * devices, num_images)
    return max(1, math.ceil(wanted / devices)) * devices


def _evaluate(
    prepared: EvalRun, model: ConViT, interruption: Interruption
) -> dict[str, Any] | None:
    """The result at one size."""
    config, mesh, size = prepared.config, prepared.mesh, model.image_shape[:2]
    params = fit.fit_params(
        prepared.loaded.params,
        model,
        new_head=False,
        resize_pos_embed=True,
        adapt_channels=False,
        grid=prepared.loaded.model.grid,
    )
    params = jax.device_put(params, sharding.replicated(mesh))
    step = evaluate.make_eval_step(
        model, config.data.mean, config.data.std, mesh, prepared.options.predictions
    )
    start = time.perf_counter()
    step = step.lower(params, _abstract_batch(prepared.share.batch_size, model, mesh)).compile()
    log.info("%d x %d: compiled in %.1f s", *size, time.perf_counter() - start)
    transform = augment.EvalTransform(size, config.augment.eval_crop)
    chunks = data.EvalChunks(prepared.source, transform, prepared.share)
    start = time.perf_counter()
    with contextlib.closing(data.iterate(chunks, workers=prepared.workers)) as batches:
        watched = _watch(batches, len(prepared.source), prepared.share.batch_size)
        result = evaluate.evaluate(
            step, {"": params}, watched, mesh, len(prepared.source), interruption.requested
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


def _watch(batches: Iterable[data.Batch], total: int, size: int) -> Iterator[data.Batch]:
    """The same batches, with a bar on a terminal or a line now and then elsewhere."""
    start = said = time.perf_counter()
    bar = tqdm.tqdm(
        total=total,
        unit="image",
        leave=False,
        disable=not (distributed.is_main() and sys.stderr.isatty()),
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
    """What `eval.json` holds; no NaN, which JSON has no word for."""
    config, loaded = prepared.config, prepared.loaded
    return {
        "weights": loaded.source,
        "step": loaded.step,
        "ema": prepared.options.ema,
        "model": model_options.variant_of(loaded.model) or "none of the paper's",
        "data": sources.describe(prepared.source),
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
        "versions": dict(workdir.versions()),
    }


def _write(path: pathlib.Path, text: str) -> None:
    with weights.whole_file(path) as unfinished:
        unfinished.write_text(text)
    log.info("wrote %s", path)
