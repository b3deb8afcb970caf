"""Loaded weights: parameters, their model, and what predictions need."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from convit_jax.model.network import ConViT
from convit_jax.model.normalise import IMAGENET_MEAN, IMAGENET_STD
from convit_jax.weights.infer import Claim


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights with their model, and what predictions need.

    Attributes:
      model: the model of the parameters.
      params: parameters for `model.apply({"params": params}, images)`; numpy arrays.
      source: file, folder or name that the weights were read from.
      class_names: names of the classes in the order of the logits; None if not known.
      mean: mean of each channel, of values in [0, 1]; ImageNet's if the source does not state it.
      std: standard deviation of each channel, with the same unit and default.
      crop_pct: share of the resized image's side that evaluation keeps; 0.875 if the source does
        not state it.
      step: step of the checkpoint; None if the weights are not from a checkpoint of a run.
      ema: whether the weights are averaged ones, of a run or of a training checkpoint.
      chosen: what the weights of a run are, such as "the best checkpoint by top-1"; else empty.
      metrics: what the run measured of these weights on the images that it holds out, such as
        {"images": 360, "top1": 0.99}; None if they were not evaluated, or adapted since.
    """

    model: ConViT
    params: Mapping[str, Any]
    source: str = ""
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    step: int | None = None
    ema: bool = False
    chosen: str = ""
    metrics: Mapping[str, float] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the model sees it, as JSON types.

        The shorter side is resized to floor(image_size / crop_pct), and the centre is cut out.
        """
        height, width, channels = self.model.image_shape
        return {
            "image_size": [height, width],
            "channels": channels,
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a source of weights contains.

    Attributes:
      params: the parameters.
      stated: options of the model that the source states; None if it states none.
      extras: fields of `Loaded` that the source states.
    """

    params: dict[str, Any]
    stated: Claim | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
