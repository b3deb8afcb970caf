"""Normalisation of pixels, from uint8 to the inputs of a model.

Shapes: B batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


# Mean and standard deviation of each channel over ImageNet's training images, scaled to [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Fits means or deviations to other input channels, in the way of `weights.adapt`.

    Returns the mean of the values for one channel, and the values in turn for more channels.
    """
    if len(values) == channels:
        return tuple(values)
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Returns (x / 255 - mean) / std for each channel.

    Args:
      images: (B, height, width, channels), uint8 pixels.
      mean: mean of each channel, of values scaled to [0, 1].
      std: standard deviation of each channel, of values scaled to [0, 1].

    Returns:
      (B, height, width, channels) float32.
    """
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - shift) / scale
