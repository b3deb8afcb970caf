"""Exact evaluation: top-1, top-5 and loss over every image, each counted once."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


_AHEAD = 2  # batches that are on their way to the devices at a time


def make_eval_step(
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    predictions: bool = False,
) -> EvalStep:
    """A jitted (params, batch) -> sums over the batch's images: loss, top1, top5, images.

    With `predictions` also, for each image of the global batch, "label" (B,) and "predictions"
    (B, 5): the classes with the largest logits, the largest first (all, where there are fewer).
    """

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = model.apply({"params": params}, normalise(batch["image"], mean, std))
        labels, mask = batch["label"], batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # 1 is first. Ties lose, so that equal logits get nothing right; NaN has rank 0 and loses.
        rank = (logits >= jnp.take_along_axis(logits, labels[:, None], axis=-1)).sum(axis=-1)
        top5 = (rank >= 1) & (rank <= 5)
        per_image = {"loss": loss, "top1": rank == 1, "top5": top5, "images": mask}
        sums = {name: (value * mask).sum() for name, value in per_image.items()}
        if not predictions:
            return sums
        best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
        return sums | {"label": labels, "predictions": best}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
    eval_step: EvalStep,
    weights: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    num_images: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Means over all images of padded batches (`data.EvalChunks`), on any number of processes.

    Args:
      eval_step: of `make_eval_step`.
      weights: parameters of the model by a prefix for their results: "" for none.
      batches: this process's share of them.
      mesh: of all devices.
      num_images: in the split; the number that was counted must be this.
      interrupted: asked before every batch whether to give up.

    Returns:
      "top1" and "top5" as shares in [0, 1], "loss" in nats, and "images", their number, for each
      of the weights; and "label" (images,) and "predictions" (images, 5) in the order of the data,
      if the step gives them. None if it was interrupted.
    """
    done: dict[str, list[dict[str, np.ndarray]]] = {prefix: [] for prefix in weights}
    running: collections.deque[dict[str, Any]] = collections.deque()

    def fetch(ahead: int) -> None:
        """Waits for the batches before the last `ahead`: else their images would pile up."""
        while len(running) > ahead:
            for prefix, outputs in jax.device_get(running.popleft()).items():
                done[prefix].append(outputs)

    for batch in batches:
        if interrupted():
            return None
        batch = sharding.put_batch(batch, mesh)
        running.append({prefix: eval_step(params, batch) for prefix, params in weights.items()})
        fetch(_AHEAD)
    fetch(0)
    result = {}
    for prefix, parts in done.items():
        means = _means(parts, num_images)
        result |= {prefix + name: value for name, value in means.items()}
    return result


def _means(parts: list[dict[str, np.ndarray]], num_images: int) -> dict[str, Any]:
    """What the batches gave, over all images."""
    images = float(sum(part["images"] for part in parts))
    if images != num_images:
        raise RuntimeError(f"evaluated {images:.0f} images: expected {num_images}")
    means: dict[str, Any] = {"images": num_images}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("label", "predictions"):  # the last batch ends in padding
            means[name] = np.concatenate(values)[:num_images]
        elif name != "images":
            means[name] = float(np.sum(values)) / num_images
    return means
