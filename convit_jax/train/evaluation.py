"""Exact evaluation: top-1, top-5 and loss over every image, each counted once."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding

EvalStep = jax.stages.Wrapped | jax.stages.Compiled  # see `make_eval_step`


_AHEAD = 2  # batches that may be in flight on the devices while the next one is read


def make_eval_step(
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
    predictions: bool = False,
    classes: Sequence[int] | None = None,
) -> jax.stages.Wrapped:
    """Returns a jitted (params, batch) -> results over a global batch of B images.

    The results are sums over the images, without padding: "loss", "top1", "top5" and "images". With
    `predictions` there are also "label" (B,); "rank" (B,), the rank of the label's logit, as below;
    "predictions" (B, 5), the five classes with the largest logits, the largest first (all classes
    if there are fewer than five); and "probabilities" (B, 5), those of the predictions.

    Args:
      model: the model to evaluate.
      mean, std: mean and standard deviation of each channel, see `normalise`.
      mesh: mesh of all devices.
      predictions: whether to return the label and the predictions of every image.
      classes: number of the logit of each class of the data; -1 leaves the class out. Labels and
        predictions count the data's classes, and no other logits are read. None means that class i
        is logit i.
    """
    columns = None if classes is None else np.asarray(classes)

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = normalise(batch["image"], mean, std)
        logits = cast(jax.Array, model.apply({"params": params}, images))
        if columns is not None:
            logits = jnp.where(columns >= 0, logits[:, columns], -jnp.inf)
        labels, mask = batch["label"], batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # The rank of the label's logit; 1 is the largest. Ties count as wrong, so that constant
        # logits are never right. NaN has rank 0 and counts as wrong too.
        rank = (logits >= jnp.take_along_axis(logits, labels[:, None], axis=-1)).sum(axis=-1)
        top5 = (rank >= 1) & (rank <= 5)
        per_image = {"loss": loss, "top1": rank == 1, "top5": top5, "images": mask}
        sums = {name: (value * mask).sum() for name, value in per_image.items()}
        if not predictions:
            return sums
        count = logits.shape[-1] if columns is None else int((columns >= 0).sum())
        best = jax.lax.top_k(logits, min(5, count))[1]
        shares = jnp.take_along_axis(jax.nn.softmax(logits), best, axis=-1)
        return sums | {"label": labels, "rank": rank, "predictions": best, "probabilities": shares}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
    eval_step: EvalStep,
    weights: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    num_images: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Evaluates weights on all images of a split, on any number of processes.

    Args:
      eval_step: the step, from `make_eval_step`.
      weights: {prefix: parameters of the model}; the prefix is put before the names of the results.
      batches: this process's share of the padded batches of `convit_jax.data.chunks.EvalChunks`.
      mesh: mesh of all devices.
      num_images: number of images of the split.
      interrupted: called before every batch; the evaluation stops if it returns True.

    Returns:
      For each of the weights, the means "top1" and "top5" in [0, 1], the mean "loss" in nats, and
      the number "images". What the step returns of every image, such as "label" (images,), is
      included in the order of the data. None if the evaluation was interrupted.

    Raises:
      RuntimeError: if the number of evaluated images is not `num_images`.
    """
    done: dict[str, list[dict[str, np.ndarray]]] = {prefix: [] for prefix in weights}
    running: collections.deque[dict[str, Any]] = collections.deque()

    def fetch(ahead: int) -> None:
        """Fetches all results but the last `ahead`, so that no images pile up on the devices."""
        while len(running) > ahead:
            for prefix, outputs in jax.device_get(running.popleft()).items():
                done[prefix].append(outputs)

    for batch in batches:
        if interrupted():
            return None
        on_devices = sharding.put_batch(batch, mesh)
        running.append({prefix: eval_step(p, on_devices) for prefix, p in weights.items()})
        fetch(_AHEAD)
    fetch(0)
    result: dict[str, Any] = {}
    for prefix, parts in done.items():
        means = _means(parts, num_images)
        result |= {prefix + name: value for name, value in means.items()}
    return result


def _means(parts: list[dict[str, np.ndarray]], num_images: int) -> dict[str, Any]:
    """Combines the results of all batches."""
    images = float(sum(part["images"] for part in parts))
    if images != num_images:
        raise RuntimeError(f"evaluated {images:.0f} images: expected {num_images}")
    means: dict[str, Any] = {"images": num_images}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if values[0].ndim:  # of every image; the last batch ends in padding
            means[name] = np.concatenate(values)[:num_images]
        elif name != "images":
            means[name] = float(np.sum(values)) / num_images
    return means
