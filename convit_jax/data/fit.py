"""Checks that a data set and a model fit each other, and settles how the images are read."""

import logging

import ml_collections

from convit_jax import recipe
from convit_jax.data import class_names
from convit_jax.data.images.reading import AS_TIMM, Reading
from convit_jax.data.source import Source, first_example
from convit_jax.model.network import ConViT
from convit_jax.model.normalise import of_channels

log = logging.getLogger(__name__)


def fit_normalisation(config: ml_collections.ConfigDict, channels: int) -> None:
    """Averages the recipe's RGB mean and deviation, for a model of one channel, and logs them.

    Other values than the recipe's are left as they are.

    Args:
      config: the configuration; data.mean and data.std are changed.
      channels: number of channels of the model.
    """
    if channels != 1:
        return
    for key in ("mean", "std"):
        if config.data[key] == recipe.KEYS[f"data.{key}"].default:
            config.data[key] = of_channels(config.data[key], 1)
            log.info("data.%s=%s: the recipe's for RGB, averaged for one channel",
                     key, config.data[key])  # fmt: skip


def settle_reading(config: ml_collections.ConfigDict, source: Source) -> None:
    """Sets data.exif and data.alpha where the configuration leaves them open.

    Images of class folders are then read as viewers show them. Those of tfds data sets, and of
    folders with ImageNet's classes, are read as timm reads them, so that results can be compared.

    Args:
      config: the configuration, see `convit_jax.recipe`; changed.
      source: the images of a split.
    """
    imagenet = {*source.class_names} <= class_names.imagenet().keys()
    folder = config.data.source.startswith("folder:")
    shown = folder and not imagenet
    for key, value in (("exif", shown), ("alpha", "white" if shown else "drop")):
        if config.data[key] is None:
            config.data[key] = value
            if folder:
                log.info("data.%s: %r, as %s", key, value, "viewers do" if shown else "timm does")


def reading(config: ml_collections.ConfigDict) -> Reading:
    """Returns how images are read; what is not settled is read as timm reads it."""
    return Reading(bool(config.data.exif), config.data.alpha or AS_TIMM.alpha)


def check_fit(
    config: ml_collections.ConfigDict,
    model: ConViT,
    source: Source,
    *,
    any_size: bool = False,
    any_classes: bool = False,
) -> None:
    """Checks classes, channels, size and normalisation of a data set against a model.

    Args:
      config: the configuration, see `convit_jax.recipe`; its `data` and `model.num_classes` are
        read.
      model: the model.
      source: the images.
      any_size: whether images in memory may have another size than the model's.
      any_classes: whether the data may have other classes than the model.

    Raises:
      ValueError: if something does not fit; the message names the configuration key.
    """
    name, num_classes = config.data.source, config.model.num_classes
    if not any_classes and num_classes not in (None, source.num_classes):
        raise ValueError(
            f"model.num_classes: expected {source.num_classes} as in {name}, got {num_classes}"
        )
    image = first_example(source, config.data.skip_corrupt)["image"]
    # Files are decoded to RGB or to grey.
    possible = (3, 1) if isinstance(image, bytes) else (image.shape[-1],)
    channels = model.in_channels
    if channels not in possible:
        expected = " or ".join(map(str, possible))
        raise ValueError(f"model.in_channels: expected {expected} as in {name}, got {channels}")
    height, width, _ = model.image_shape
    if not isinstance(image, bytes) and not any_size and image.shape[:2] != (height, width):
        raise ValueError(
            f"model.image_size: expected {image.shape[0]}x{image.shape[1]} (height x width) as in "
            f"{name}, got {height}x{width}"
        )
    for key in ("mean", "std"):
        if len(config.data[key]) != channels:
            raise ValueError(f"data.{key}: expected {channels} values, got {config.data[key]}")
