"""Exact evaluation: top-1, top-5 and loss over every image, each counted once."""

import collections
from collections.abc import Callable, Iterable, Sequence
import logging
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from convit_jax.data.corrupt import CorruptImageError
from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding
from convit_jax.train import forms

log = logging.getLogger(__name__)

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

    The results are sums over the images, without padding and corrupt images: "loss", "top1", "top5"
    and "images"; "corrupt" is the number of corrupt images. With `predictions` there are also
    arrays (B, ...): "evaluated", False for padding and corrupt images; "label"; "losses"; "rank",
    the rank of the label's logit, as below; "predictions" (B, 5), the five classes with the largest
    logits, the largest first (all classes if there are fewer than five); and "probabilities"
    (B, 5), those of the predictions. Labels and predictions of corrupt images are -1, and so are
    the predictions for padding.

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
    model = forms.over_mesh(model, mesh)

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = normalise(batch["image"], mean, std)
        logits = cast(jax.Array, model.apply({"params": params}, images))
        if columns is not None:
            logits = jnp.where(columns >= 0, logits[:, columns], -jnp.inf)
        labels, mask = batch["label"], batch["mask"]
        evaluated = mask > 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # The rank of the label's logit; 1 is the largest. Ties count as wrong, so that constant
        # logits are never right. NaN has rank 0 and counts as wrong too.
        rank = (logits >= jnp.take_along_axis(logits, labels[:, None], axis=-1)).sum(axis=-1)
        top5 = (rank >= 1) & (rank <= 5)
        per_image = {"loss": loss, "top1": rank == 1, "top5": top5, "images": mask}
        sums = {k: jnp.where(evaluated, v, 0.0).sum() for k, v in per_image.items()}
        sums["corrupt"] = (mask < 0).astype(jnp.float32).sum()
        if not predictions:
            return sums
        count = logits.shape[-1] if columns is None else int((columns >= 0).sum())
        best = jax.lax.top_k(logits, min(5, count))[1]
        shares = jnp.take_along_axis(jax.nn.softmax(logits), best, axis=-1)
        return sums | {
            "evaluated": evaluated,
            "label": labels,
            "losses": loss,
            "rank": rank,
            "predictions": jnp.where(evaluated[:, None], best, -1),
            "probabilities": shares,
        }

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
      batches: this process's share of the padded batches of `EvalChunks`.
      mesh: mesh of all devices.
      num_images: number of images of the split.
      interrupted: called before every batch; the evaluation stops if it returns True.

    Returns:
      For each of the weights, the means "top1" and "top5" in [0, 1], the mean "loss" in nats, and
      the number "images". If some of the split's N images are corrupt, "images" does not count
      them, and "corrupt_images" is their number. If the step returns arrays for every image, such
      as "evaluated" and "label", they are included with N rows, in the order of the data. None if
      the evaluation was interrupted.

    Raises:
      CorruptImageError: if all images are corrupt.
      RuntimeError: if the number of evaluated and of corrupt images is not `num_images`.
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
    corrupt = _check_count(next(iter(done.values())), num_images)
    result: dict[str, Any] = {}
    for prefix, parts in done.items():
        means = _means(parts, num_images, corrupt)
        result |= {prefix + name: value for name, value in means.items()}
    return result


def _check_count(parts: list[dict[str, np.ndarray]], num_images: int) -> int:
    """Returns the number of corrupt images; raises if not all images were evaluated or corrupt."""
    images, corrupt = (round(float(sum(p[k] for p in parts))) for k in ("images", "corrupt"))
    if images + corrupt != num_images:
        also = f" and left out {corrupt} corrupt ones" if corrupt else ""
        raise RuntimeError(f"evaluated {images} images{also}: expected {num_images}")
    if not images:
        raise CorruptImageError(f"all {num_images} images to evaluate are corrupt")
    if corrupt:
        log.warning(
            "%d of %d images are corrupt and left out: the results are over the other %d",
            corrupt, num_images, images,
        )  # fmt: skip
    return corrupt


def _means(parts: list[dict[str, np.ndarray]], num_images: int, corrupt: int) -> dict[str, Any]:
    """Combines the results of all batches."""
    images = num_images - corrupt
    means: dict[str, Any] = {"images": images}
    if corrupt:
        means["corrupt_images"] = corrupt
    for name in parts[0]:
        values = [part[name] for part in parts]
        if values[0].ndim:  # of every image; the last batch ends in padding
            means[name] = np.concatenate(values)[:num_images]
        elif name not in ("images", "corrupt"):
            means[name] = float(np.sum(values)) / images
    return means
