"""Export of a model as StableHLO: one file with the weights in it, which needs only jax to run.

import jax
call = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
logits = call(images)         # images (batch, height, width, channels), float32, normalised
"""

import os
from typing import cast

import jax
import jax.export
import jax.numpy as jnp

from convit_jax.storage import whole_file
from convit_jax.weights.loaded import Loaded

# The file contains a program for each platform. A call runs the one of the caller's platform.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save_exported(path: str | os.PathLike, loaded: Loaded, batch: int | None = None) -> None:
    """Writes a model with its weights as a float32 program.

    The file is written whole or not at all. jax promises that its releases of at least the next
    six months can read it.

    Args:
      path: the file to write.
      loaded: model and weights.
      batch: number of images of every call; None lets each call choose its own.

    Raises:
      ValueError: if `batch` is less than one.
      OSError: if the file cannot be written.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")
    model = loaded.model.clone(dtype=jnp.float32, attention="auto", remat="none")

    def inference(images: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": loaded.params}, images))

    size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    images = jax.ShapeDtypeStruct((size, *model.image_shape), jnp.float32)
    # By default TPUs and GPUs multiply float32 matrices with less than float32 precision.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(inference), platforms=PLATFORMS)(images)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(exported.serialize())
