"""StableHLO files: a network with its weights as a program, which needs only jax to run.

A file consists of the program, a line feed, a line of JSON (see `about`), a line feed, and the
SHA-256 of all before that. jax ignores what follows the program:

call = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
logits = call(images)         # images (batch, height, width, channels)
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import os
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp

from convit_jax import storage
from convit_jax.model import flops, sdpa
from convit_jax.model.normalise import IMAGENET_MEAN, IMAGENET_STD, normalise
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
      num_classes: number of logits.
      sha256: hash of the file's content, in hexadecimal.
    """

    call: Callable[[jax.Array], jax.Array]
    about: dict[str, Any]
    num_classes: int
    sha256: str


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
        "parameters": _count(loaded.params),
        "flops": flops.forward_flops(loaded.model),
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
    _check_batch(batch)
    model = loaded.model
    # The program is for several platforms, so no kernel of a single one is in it.
    attention = sdpa.choose("auto", math.prod(model.grid), model.attn_dropout, backend="cpu")
    model = model.clone(dtype=jnp.float32, attention=attention, remat="none", flat_tokens=False)

    def inference(images: jax.Array) -> jax.Array:
        if uint8:
            images = normalise(images, loaded.mean, loaded.std)
        return cast(jax.Array, model.apply({"params": loaded.params}, images))

    _write(path, inference, about(loaded, batch, "uint8" if uint8 else "float32"))


def save_network(
    path: str | os.PathLike,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    image_shape: tuple[int, int, int],
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_pct: float = 0.875,
    batch: int | None = None,
) -> None:
    """Writes any network with its parameters as a float32 program, for `distill.teacher`.

    The file is written whole or not at all. Its FLOPs are those that XLA counts, with elementwise
    operations.

    Args:
      path: the file to write.
      apply: (params, images) -> logits (B, classes), a pure function in evaluation mode. The images
        are (B, height, width, channels) float32, normalised.
      params: tree of arrays.
      image_shape: (height, width, channels).
      class_names: names of the classes in the order of the logits; None if not known.
      mean, std: normalisation of the images, see `normalise`.
      crop_pct: share of the resized image's side that evaluation keeps.
      batch: number of images of every call; None lets each call choose its own.

    Raises:
      ValueError: if the logits or a value do not have the expected shape.
      OSError: if the file cannot be written.
    """
    _check_batch(batch)
    height, width, channels = image_shape
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {values}")
    image = jax.ShapeDtypeStruct((batch or 1, *image_shape), jnp.float32)
    inference = functools.partial(apply, params)
    logits = jax.eval_shape(inference, image).shape
    classes = logits[-1] if class_names is None else len(class_names)
    if logits != (batch or 1, classes):
        raise ValueError(f"logits: expected {(batch or 1, classes)}, got {logits}")
    counted = jax.jit(inference).lower(image).cost_analysis() or {}
    described = {
        "input": [batch, *image_shape],
        "dtype": "float32",
        "normalised_inside": False,
        "image_size": [height, width],
        "channels": channels,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "mean": [float(x) for x in mean],
        "std": [float(x) for x in std],
        "class_names": None if class_names is None else list(class_names),
        "parameters": _count(params),
        "flops": counted["flops"] / (batch or 1) if "flops" in counted else None,
    }
    _write(path, inference, described)


def _check_batch(batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _write(
    path: str | os.PathLike,
    inference: Callable[[jax.Array], jax.Array],
    described: dict[str, Any],
) -> None:
    batch, *image_shape = described["input"]
    size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.dtype(described["dtype"]))
    # By default TPUs and GPUs multiply float32 matrices with less than float32 precision.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(inference), platforms=PLATFORMS)(images)
    content = b"\n".join((exported.serialize(), json.dumps(described).encode()))
    with storage.whole_file(path) as unfinished:
        unfinished.write_bytes(b"\n".join((content, hashlib.sha256(content).hexdigest().encode())))


def read_exported(path: str | os.PathLike) -> Exported:
    """Reads a file of `save_exported` or `save_network`.

    The checksum is compared first: jax itself does not notice a damaged program, which may then
    compute wrong numbers or crash the interpreter.

    Raises:
      ValueError: if the file is damaged, was not written by either, or is of a version of jax that
        the installed one cannot read.
      OSError: if the file cannot be read.
    """
    content, _, checksum = storage.as_path(path).read_bytes().rpartition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise ValueError(
            f"{path}: its SHA-256 is not the one at its end: the file is damaged, or not one of "
            "`convit convert` or `stablehlo.save_network`, or one of a version without checksums; "
            "convert the weights again"
        )
    program, _, line = content.rpartition(b"\n")
    try:
        exported = jax.export.deserialize(bytearray(program))
        (logits,) = exported.out_avals
        return Exported(exported.call, json.loads(line), logits.shape[-1], checksum.decode())
    except Exception as error:  # jax raises several types for a format that it does not know
        raise ValueError(f"{path}: jax {jax.__version__} cannot read it: {error}") from error
