"""StableHLO files: a model with its weights as a program, which needs only jax to run.

A file consists of the program, a line feed, a line of JSON (see `about`), a line feed, and the
SHA-256 of all before that. jax ignores what follows the program:

call = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
logits = call(images)         # images (batch, height, width, channels)
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp

from convit_jax import storage
from convit_jax.model.normalise import normalise
from convit_jax.weights.digest import digest
from convit_jax.weights.loaded import Loaded

# The file contains a program for each platform. A call runs the one of the caller's platform.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Exported:
    """The content of a StableHLO file.

    Attributes:
      call: the program: images -> logits, both arrays.
      about: what the file says of the program, see `about`.
    """

    call: Callable[[jax.Array], jax.Array]
    about: dict[str, Any]


def about(loaded: Loaded, batch: int | None, dtype: str) -> dict[str, Any]:
    """Returns what a caller of the program has to know, as JSON types.

    Args:
      loaded: model and weights.
      batch: number of images of every call; None if it is free.
      dtype: "uint8" if the program takes pixels, "float32" if it takes normalised images.
    """
    return {
        "input": [batch, *loaded.model.image_shape],
        "dtype": dtype,
        "normalised_inside": dtype == "uint8",
        **loaded.preprocessing,
        "class_names": loaded.class_names,
        "weights_sha256": digest(loaded.params),
    }


def save_exported(
    path: str | os.PathLike, loaded: Loaded, batch: int | None = None, *, uint8: bool = False
) -> None:
    """Writes a model with its weights as a float32 program.

    The file is written whole or not at all. jax promises that its releases of at least the next
    six months can read it.

    Args:
      path: the file to write.
      loaded: model and weights.
      batch: number of images of every call; None lets each call choose its own.
      uint8: whether the program takes uint8 pixels and normalises them. Else it takes float32
        images that are normalised already.

    Raises:
      ValueError: if `batch` is less than one.
      OSError: if the file cannot be written.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")
    model = loaded.model.clone(dtype=jnp.float32, attention="auto", remat="none")

    def inference(images: jax.Array) -> jax.Array:
        if uint8:
            images = normalise(images, loaded.mean, loaded.std)
        return cast(jax.Array, model.apply({"params": loaded.params}, images))

    size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    dtype = jnp.uint8 if uint8 else jnp.float32
    images = jax.ShapeDtypeStruct((size, *model.image_shape), dtype)
    # By default TPUs and GPUs multiply float32 matrices with less than float32 precision.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(inference), platforms=PLATFORMS)(images)
    line = json.dumps(about(loaded, batch, jnp.dtype(dtype).name)).encode()
    content = b"\n".join((exported.serialize(), line))
    with storage.whole_file(path) as unfinished:
        unfinished.write_bytes(b"\n".join((content, hashlib.sha256(content).hexdigest().encode())))


def read_exported(path: str | os.PathLike) -> Exported:
    """Reads a file of `save_exported`.

    The checksum is compared first: jax itself does not notice a damaged program, which may then
    compute wrong numbers or crash the interpreter.

    Raises:
      ValueError: if the file is damaged, was not written by `save_exported`, or is of a version of
        jax that the installed one cannot read.
      OSError: if the file cannot be read.
    """
    content, _, checksum = storage.as_path(path).read_bytes().rpartition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise ValueError(
            f"{path}: its SHA-256 is not the one at its end: the file is damaged, or not one of "
            "`convit convert`, or one of a version without checksums; convert the weights again"
        )
    program, _, line = content.rpartition(b"\n")
    try:
        exported = jax.export.deserialize(bytearray(program))
        return Exported(exported.call, json.loads(line))
    except Exception as error:  # jax raises several types for a format that it does not know
        raise ValueError(f"{path}: jax {jax.__version__} cannot read it: {error}") from error
