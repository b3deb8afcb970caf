"""Inference as one file that needs only jax to be called: StableHLO, the weights in it.

import jax
call = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
logits = call(images)         # images as the model takes them: float32, normalised
"""

import os
from typing import cast

import jax
import jax.export
import jax.numpy as jnp

from convit_jax.storage import whole_file
from convit_jax.weights.loaded import Loaded

# A program for each; which one is run is seen when it is called.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save_exported(path: str | os.PathLike, loaded: Loaded, batch: int) -> None:
    """Writes the model with its weights, float32, for so many images; whole, or not at all.

    jax promises to read such files for six months of its releases at least.

    Args:
      path: of the file.
      loaded: model and weights.
      batch: images of a call.

    Raises:
      ValueError: if `batch` is less than one.
      OSError: if it cannot be written.
    """
    if batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")
    model = loaded.model.clone(dtype=jnp.float32, attention="auto", remat="none")

    def inference(images: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": loaded.params}, images))

    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32)
    # TPUs and GPUs would otherwise multiply in less than float32.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(inference), platforms=PLATFORMS)(images)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(exported.serialize())
