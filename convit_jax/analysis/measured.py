"""What `convit analyse` measures: gates, non-locality, attention maps, and accuracy when masked.

Shapes: L layers, G GPSA layers, H heads, R and C rows and columns of patches.
"""

from collections.abc import Iterable, Iterator, Sequence
import functools
import itertools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.analysis import masking
from convit_jax.analysis.images import Image
from convit_jax.model.locality import distances, gates, query_attention, reach
from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding
from convit_jax.parallel.signals import Interruption
from convit_jax.train import eval_report, eval_run, probe
from convit_jax.train.eval_setup import EvalRun
from convit_jax.weights.loaded import Loaded

log = logging.getLogger(__name__)


def measure_gates(loaded: Loaded) -> dict[str, Any]:
    """Returns the gates of all heads (figure 6): "gates" (G, H), and what the weights are.

    Raises:
      ValueError: if the model has no GPSA layer.
    """
    found = gates(loaded.params)
    if not len(found):
        raise ValueError(f"{loaded.source}: expected a model with GPSA layers, got a DeiT")
    return {**_weights(loaded), "gates": _numbers(found)}


def measure_nonlocality(loaded: Loaded, images: Iterable[Image]) -> dict[str, Any]:
    """Measures the non-locality of all heads (equation 8, figure 5) as the mean over images.

    Args:
      loaded: the weights.
      images: name and pixels of each image, in any number; a batch is in memory at a time.

    Returns:
      "nonlocality": "blended" (L, H), "content" (L, H), "positional" (G, H), in patches; "gates"
      (G, H); "uniform", the non-locality of an attention to all patches alike; "images", their
      number; "grid", and what the weights are.

    Raises:
      ValueError: if there is no image.
    """
    model, mesh = loaded.model, sharding.make_mesh(devices=jax.local_devices()[:1])
    count = 0

    def batches() -> Iterator[dict[str, jax.Array]]:
        nonlocal count
        size = probe.batch_size(model, mesh)
        rest = iter(images)
        while some := list(itertools.islice(rest, size)):
            count += len(some)
            pixels = np.zeros((size, *model.image_shape), np.uint8)
            pixels[: len(some)] = [image for _, image in some]
            mask = np.arange(size) < len(some)
            yield sharding.put_batch({"image": pixels, "mask": mask.astype(np.float32)}, mesh)

    step = probe.make_step(model, loaded.mean, loaded.std, mesh)
    found = probe.measure(step, jax.device_put(loaded.params), batches())
    if not count:
        raise ValueError("images: expected one or more, got none")
    size = math.prod(model.grid)
    return {
        **_weights(loaded),
        "images": count,
        "grid": list(model.grid),
        "uniform": float(reach(jnp.full((size, size), 1 / size), model.grid)),
        "gates": _numbers(gates(loaded.params)),
        "nonlocality": {name: _numbers(values) for name, values in found.items()},
    }


def measure_maps(
    loaded: Loaded,
    images: Iterable[Image],
    *,
    layers: Sequence[int] | None = None,
    queries: Sequence[tuple[int, int]] | None = None,
    part: str = "blended",
) -> dict[str, Any]:
    """Returns the attention of query patches in images (figure 7).

    Args:
      loaded: the weights.
      images: name and pixels of each image.
      layers: layers to keep, counted from 1; None keeps all that have the part.
      queries: row and column of each query patch, counted from 1; None is the central patch.
      part: one of `locality.PARTS`; plain layers have no "positional" part.

    Returns:
      "layers"; "part"; "maps", for each image and query {"image", "query", "distance" (layers, H),
      the mean distance of the attended patches from the query, "attention" (layers, H, R, C)};
      "grid", and what the weights are.

    Raises:
      ValueError: if the model has no such layer, or a query is outside of the grid.
    """
    model, (rows, columns) = loaded.model, loaded.model.grid
    depth = model.local_up_to_layer if part == "positional" else model.depth
    if not depth:
        raise ValueError(f"{loaded.source}: expected a model with GPSA layers, got a DeiT")
    layers = range(1, depth + 1) if layers is None else layers
    if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
        kind = " (GPSA layers alone have a positional part)" if part == "positional" else ""
        raise ValueError(f"layers: expected 1 to {depth}, got {wrong[0]}{kind}")
    queries = [(rows // 2 + 1, columns // 2 + 1)] if queries is None else queries
    for row, column in queries:
        if not (1 <= row <= rows and 1 <= column <= columns):
            raise ValueError(
                f"query: expected a row of 1 to {rows} and a column of 1 to {columns}, got "
                f"{row},{column}"
            )
    places = [(row - 1, column - 1) for row, column in queries]

    @jax.jit
    def attend(params: Any, pixels: jax.Array) -> jax.Array:
        normal = normalise(pixels[None], loaded.mean, loaded.std)
        seen = query_attention(model, {"params": params}, normal, places)[part]
        return seen if part == "positional" else seen[:, 0]  # (L, H, Q, R, C)

    params, away = jax.device_put(loaded.params), np.asarray(distances(model.grid))
    found = []
    for name, pixels in images:
        attention = np.asarray(attend(params, jnp.asarray(pixels)))[np.asarray(layers) - 1]
        for number, (query, (row, column)) in enumerate(zip(queries, places, strict=True)):
            of_query = attention[:, :, number]
            distance = of_query * away[row * columns + column].reshape(rows, columns)
            found.append(
                {
                    "image": name,
                    "query": list(query),
                    "distance": _numbers(distance.sum(axis=(-1, -2))),
                    "attention": _numbers(of_query),
                }
            )
    return {
        **_weights(loaded),
        "grid": [rows, columns],
        "layers": list(layers),
        "part": part,
        "maps": found,
    }


def measure_masking(prepared: EvalRun, first: Sequence[int] | None) -> dict[str, Any] | None:
    """Evaluates weights as they are and with each masking, on the same images.

    Args:
      prepared: the evaluation, from `eval_setup.prepare`.
      first: numbers of GPSA layers, counted from the input, in which to mask content and position;
        None is `masking.default_layers`.

    Returns:
      What `convit eval` writes, with a result for each masking, see `evaluate_masked`. None if it
      was interrupted.

    Raises:
      ValueError: if the model has fewer GPSA layers.
      OSError: if an image cannot be read.
    """
    found = evaluate_masked(prepared, first)
    return None if found is None else eval_report.contents(prepared, found[0])


def evaluate_masked(
    prepared: EvalRun, first: Sequence[int] | None
) -> tuple[list[dict[str, Any]], eval_report.PerImage] | None:
    """Evaluates weights as they are and with each masking, and reads each image once.

    Takes the arguments of `measure_masking`, and raises its errors.

    Returns:
      A result for each masking: "masked" is "nothing", "position embedding", "content" or
      "position", "layers" the number of masked layers or None, and "top1", "top5", "loss" and
      "images" are those of `evaluation.evaluate`. Then, with nothing masked, the results of each
      image. None if it was interrupted.
    """
    model = prepared.models[0]
    first = masking.default_layers(model.local_up_to_layer) if first is None else first
    maskings: dict[tuple[str, int | None], Any] = {("nothing", None): dict}
    if model.use_pos_embed:
        maskings["position embedding", None] = masking.without_position_embedding
    kinds = {"content": masking.without_content, "position": masking.without_position}
    for masked, function in kinds.items():
        maskings |= {(masked, n): functools.partial(function, layers=n) for n in first}

    def make(params: dict[str, Any]) -> dict[str, Any]:
        return {f"{i} ": mask(params) for i, mask in enumerate(maskings.values())}

    with Interruption() as interruption:
        found, _ = eval_run.evaluate_each(prepared, model, make, interruption, predictions=True)
    if found is None:
        log.info("stopped: there are no results")
        return None
    names = ("top1", "top5", "loss", "images", "corrupt_images")
    results = [
        {
            "masked": masked,
            "layers": layers,
            "image_size": list(model.image_shape[:2]),
            **{name: found[f"{i} {name}"] for name in names if f"{i} {name}" in found},
        }
        for i, (masked, layers) in enumerate(maskings)
    ]
    unmasked = {k.removeprefix("0 "): v for k, v in found.items() if k.startswith("0 ")}
    arrays = {k: v for k, v in unmasked.items() if isinstance(v, np.ndarray)}
    return results, eval_report.of_evaluated(arrays)


def _weights(loaded: Loaded) -> dict[str, Any]:
    """Returns what the weights are, and of which layers and size, as JSON types."""
    return {
        **eval_report.of_weights(loaded),
        "gpsa_layers": loaded.model.local_up_to_layer,
        "image_size": list(loaded.model.image_shape[:2]),
    }


def _numbers(values: Any) -> list:
    """Returns an array as lists of numbers with six digits."""
    return [float(f"{x:.6g}") if np.ndim(x) == 0 else _numbers(x) for x in np.asarray(values)]
