"""Normalisation: from pixels to what a model takes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


# Mean and standard deviation of ImageNet's training images, for each channel, of values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (B, height, width, channels) -> float32: (x / 255 - mean) / std for each channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std
