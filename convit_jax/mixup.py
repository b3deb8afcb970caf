"""What happens to a batch on the device, inside the jitted step, before the model sees it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (B, height, width, channels) -> float32: (x / 255 - mean) / std for each channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def soft_labels(labels: Array, num_classes: int, smoothing: float) -> Array:
    """(B,) integers -> (B, num_classes): 1 - smoothing on the label, and smoothing spread evenly
    over all the classes (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)
