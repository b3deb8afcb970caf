"""Weights together with their model and what predictions need."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from convit_jax.model.network import ConViT
from convit_jax.model.normalise import IMAGENET_MEAN, IMAGENET_STD
from convit_jax.weights.infer import Claim


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights with their model, and what predictions need besides.

    Attributes:
      model: the one that `params` fit.
      params: what goes into `model.apply({"params": params}, images)`; numpy arrays.
      source: where they are from.
      class_names: in the order of the logits; None if not known.
      mean: per channel, of values in [0, 1]; ImageNet's where the source does not say.
      std: likewise.
      crop_pct: of the evaluation's resized image; 0.875 where the source does not say.
      step: of the checkpoint, if a run's was read.
    """

    model: ConViT
    params: Mapping[str, Any]
    source: str = ""
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a source holds: parameters, and what it says of them (fields of `Loaded`)."""

    params: dict[str, Any]
    stated: Claim | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
