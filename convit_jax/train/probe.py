"""Gates and non-locality during training, on the same few test images at each evaluation.

These are the numbers of figures 5 and 6 of the paper. `convit_jax.model.locality` defines them.
"""

from collections.abc import Callable, Iterable
import contextlib
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from convit_jax.data.batches.chunks import EvalChunks, Share
from convit_jax.data.batches.workers import iterate
from convit_jax.data.source import Source, Subset
from convit_jax.model.locality import gates, image_nonlocality
from convit_jax.model.network import ConViT
from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding
from convit_jax.train import forms
from convit_jax.train.setup import Run

log = logging.getLogger(__name__)

Step = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]

_MOST = 32  # images, if the configuration does not say
_AT_ONCE = 2**26  # bytes that one layer's map of all images of a device may have
_LARGEST = 2**28  # bytes of one image's map, above which training does not measure


class Probe:
    """Measures gates and non-locality of a run on a fixed batch of test images.

    The images are the same on any number of processes, and at every start of the run.
    """

    def __init__(self, run: Run):
        """Chooses train.probe_images of the test images, spread evenly, and reads nothing."""
        model, mesh = run.program.model, run.program.mesh
        data, count, chunks = run.config.data, _count(run), run.test_chunks
        self._mesh, self._workers = mesh, run.workers
        self._gates = self._step = None
        self._batches: list[dict[str, jax.Array]] | None = None
        if not count:
            return
        self._gates = jax.jit(gates, out_shardings=sharding.replicated(mesh))
        some = spread(chunks.source, count)
        whole = math.ceil(len(some) / mesh.size) * mesh.size
        share = Share(min(batch_size(model, mesh), whole), chunks.share.index, chunks.share.count)
        self._chunks = EvalChunks(some, chunks.transform, share, chunks.skip_corrupt)
        if map_bytes(model) <= _LARGEST:
            self._step = make_step(model, data.mean, data.std, mesh)
        else:
            log.info(
                "evaluations measure no non-locality: at this image size the attention map of one "
                "image and layer has %d MB, more than the limit of %d MB",
                map_bytes(model) >> 20, _LARGEST >> 20,
            )  # fmt: skip

    def __call__(self, params: Any) -> dict[str, list]:
        """Returns the measures of the parameters; every process of the run must call it.

        Returns:
          "head_gates", the gate of each head of each GPSA layer, and "nonlocality", for each layer
          the mean over heads and images; {} if the probe is off.
        """
        found: dict[str, list] = {}
        if self._gates is not None and "gpsa_blocks" in params:
            found["head_gates"] = np.asarray(self._gates(params)).tolist()
        if self._step is not None:
            if self._batches is None:  # uint8, and kept on the devices
                with contextlib.closing(iterate(self._chunks, workers=self._workers)) as batches:
                    self._batches = [sharding.put_batch(batch, self._mesh) for batch in batches]
            means = measure(self._step, params, self._batches)
            found["nonlocality"] = means["blended"].mean(axis=-1).tolist()
        return found


def _count(run: Run) -> int:
    """Returns the number of images of the probe, see train.probe_images in the recipe."""
    config = run.config
    if config.train.probe_images is not None:
        return config.train.probe_images
    between = config.train.eval_every * run.steps_per_epoch * config.train.batch_size
    return min(_MOST, max(1, int(between / 100)))


def spread(source: Source, count: int) -> Subset:
    """Returns `count` images that are spread evenly over a source, or all if it has fewer."""
    places = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    return Subset(source, places, f"{source.description}, {len(places)} images")


def batch_size(model: ConViT, mesh: Mesh) -> int:
    """Returns how many images of a model to measure at once, so that their maps fit in memory."""
    return mesh.size * min(32, max(1, _AT_ONCE // map_bytes(model)))


def map_bytes(model: ConViT) -> int:
    """Returns the bytes of the attention map of one layer for one image."""
    return 4 * model.num_heads * (1 + math.prod(model.grid)) ** 2


def make_step(
    model: ConViT, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh
) -> jax.stages.Wrapped:
    """Returns a jitted (params, batch) -> sums over the images of a global batch, for `measure`.

    The batch has "image", uint8, and "mask", which is 1 for the images that count, as in
    `EvalChunks`. The sums are those of `image_nonlocality`, {name: (layers, H)}, and "images".
    """
    model = forms.over_mesh(model, mesh)

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = normalise(batch["image"], mean, std)
        counts = (batch["mask"] > 0).astype(jnp.float32)
        found = image_nonlocality(model, {"params": params}, images)
        sums = {
            name: x * counts.sum() if name == "positional" else (x * counts[:, None]).sum(axis=1)
            for name, x in found.items()
        }
        return {**sums, "images": counts.sum()}

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def measure(
    step: Step, params: Any, batches: Iterable[dict[str, jax.Array]]
) -> dict[str, np.ndarray]:
    """Returns the non-locality of every head, {name: (layers, H)}, as the mean over all images.

    Args:
      step: the step, from `make_step`.
      params: parameters of the model.
      batches: global batches of the step; one at a time is in memory if they are made so.
    """
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, x in jax.device_get(step(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(x, np.float64)
    images = totals.pop("images", 0.0)
    return {name: total / images for name, total in totals.items()}
