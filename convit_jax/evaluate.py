"""Exact evaluation: top-1, top-5 and loss over every image, each counted once."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from convit_jax import mixup, sharding

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


def make_eval_step(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh
) -> EvalStep:
    """A jitted (params, batch) -> sums over the batch's images: loss, top1, top5, images."""

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = model.apply({"params": params}, mixup.normalise(batch["image"], mean, std))
        labels, mask = batch["label"], batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # 1 is first. Ties lose, so that equal logits get nothing right; NaN has rank 0 and loses.
        rank = (logits >= jnp.take_along_axis(logits, labels[:, None], axis=-1)).sum(axis=-1)
        top5 = (rank >= 1) & (rank <= 5)
        per_image = {"loss": loss, "top1": rank == 1, "top5": top5, "images": mask}
        return {name: (value * mask).sum() for name, value in per_image.items()}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
    eval_step: EvalStep,
    weights: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    num_images: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
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
      of the weights. None if it was interrupted.
    """
    sums: dict[str, list[Any]] = {prefix: [] for prefix in weights}
    for batch in batches:
        if interrupted():
            return None
        batch = sharding.put_batch(batch, mesh)
        for prefix, params in weights.items():
            sums[prefix].append(eval_step(params, batch))
    result = {}
    for prefix, parts in jax.device_get(sums).items():
        totals = jax.tree.map(lambda *values: float(np.sum(values)), *parts)
        images = totals.pop("images")
        if images != num_images:
            raise RuntimeError(f"evaluated {images:.0f} images: expected {num_images}")
        means = {name: total / images for name, total in totals.items()} | {"images": int(images)}
        result |= {prefix + name: mean for name, mean in means.items()}
    return result
