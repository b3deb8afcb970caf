"""The teacher of a distillation: any weights that `load` reads, or any network as a program."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import jax
import ml_collections

from convit_jax import recipe
from convit_jax.model import flops
from convit_jax.model.network import ConViT
from convit_jax.model.variants import options_of_kind, plain
from convit_jax.weights import stablehlo
from convit_jax.weights.digest import digest
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A network as it was read.

    Attributes:
      source: what the teacher was read from, for messages.
      image_shape: (height, width, channels) of its images.
      num_classes: number of its logits.
      class_names: names of its classes in the order of the logits; None if not known.
      mean, std: normalisation of its images, see `normalise`.
      model: its model; None for a StableHLO program.
      params: its parameters; empty for a StableHLO program, which contains them.
      program: the StableHLO program, images -> logits; None for a model.
      batch: number of images that the program takes; None if it takes any number.
      parameters: number of parameters; None if not known.
      flops: FLOPs of one image; None if not known.
    """

    source: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: ConViT | None = None
    params: Any = dataclasses.field(default_factory=dict)
    program: Callable[[jax.Array], jax.Array] | None = None
    batch: int | None = None
    parameters: int | None = None
    flops: float | None = None


def read(config: ml_collections.ConfigDict) -> Teacher | None:
    """Reads the teacher of a configuration, and sets distill.sha256 to what identifies it.

    A run's averaged weights are taken if it has any.

    Args:
      config: the configuration, see `convit_jax.recipe`; changed.

    Returns:
      The teacher; None if the configuration has none.

    Raises:
      ValueError: if the teacher is not that of distill.sha256, or options of the distillation do
        not fit together.
      OSError: if the teacher cannot be read.
    """
    source = config.distill.teacher
    _check_options(config.distill)
    if not source:
        return None
    is_program = source.endswith(".stablehlo")
    teacher, sha256 = _read_program(source) if is_program else _read_model(source)
    wanted = config.distill.sha256
    if wanted and wanted != sha256:
        raise ValueError(
            f"distill.teacher: expected the teacher with the SHA-256 {wanted} (distill.sha256), "
            f"got {sha256} in {source}"
        )
    config.distill.sha256 = sha256
    return teacher


def _check_options(options: ml_collections.ConfigDict) -> None:
    """Raises ValueError if an option is given that would do nothing."""
    changed = [
        leaf
        for leaf in ("kind", "alpha", "tau", "sha256")
        if options[leaf] != recipe.KEYS[f"distill.{leaf}"].default
    ]
    if changed and not options.teacher:
        key = f"distill.{changed[0]}"
        raise ValueError(f"{key}={options[changed[0]]}: expected distill.teacher with it")
    if "tau" in changed and options.kind != "soft":
        raise ValueError(f"distill.tau={options.tau:g}: expected distill.kind=soft with it")


@contextlib.contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"distill.teacher: {error}") from error
    except OSError as error:
        raise OSError(f"distill.teacher: {error}") from error


def _read_model(source: str) -> tuple[Teacher, str]:
    with _naming_the_key():
        loaded = read_weights(source, ema=None)
    model = loaded.model
    model.check_classifies(f"distill.teacher: {source}")
    chosen = [loaded.chosen] if loaded.chosen else []
    chosen += ["averaged"] if loaded.ema else []
    teacher = Teacher(
        source=f"{source} ({', '.join(chosen)})" if chosen else source,
        image_shape=model.image_shape,
        num_classes=model.num_classes,
        class_names=loaded.class_names,
        mean=loaded.mean,
        std=loaded.std,
        model=model,
        params=loaded.params,
        parameters=sum(x.size for x in jax.tree.leaves(loaded.params)),
        flops=flops.forward_flops(model),
    )
    return teacher, _sha256(loaded)


def _sha256(loaded: Loaded) -> str:
    """Returns a hash of everything that the answers of weights depend on, in hexadecimal."""
    kinds = options_of_kind("structure", "changeable", "function")
    options = {key: plain(getattr(loaded.model, key)) for key in kinds}
    answers = [digest(loaded.params), options, loaded.class_names, loaded.mean, loaded.std]
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()


def _read_program(source: str) -> tuple[Teacher, str]:
    with _naming_the_key():
        exported = stablehlo.read_exported(source)
    about = exported.about
    if about["dtype"] != "float32":
        raise ValueError(
            f"distill.teacher: {source} takes {about['dtype']} pixels, but mixed and erased images "
            "are no whole pixels: expected a program of float32 images (convert without --uint8)"
        )
    names = about["class_names"]
    batch, height, width, channels = about["input"]
    teacher = Teacher(
        source=source,
        image_shape=(height, width, channels),
        num_classes=exported.num_classes,
        class_names=None if names is None else tuple(names),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        program=exported.call,
        batch=batch,
        parameters=about.get("parameters"),
        flops=about.get("flops"),
    )
    return teacher, exported.sha256
