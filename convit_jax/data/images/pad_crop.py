"""The augmentation of small images, for one or many at once: pad, crop and flip.

This is the CIFAR augmentation of He et al. 2016 (arXiv:1512.03385, section 4.2).
"""

import numpy as np

from convit_jax.data.images.opencv import opencv
from convit_jax.data.images.random_numbers import Uniform

NUMBERS = 3  # uniform numbers for each image: place (y, x) and flip


def pad_and_crop(image: np.ndarray, rng: Uniform, padding: int) -> np.ndarray:
    """Pads an image with black borders and crops it to its old size at a random place.

    Args:
      image: (height, width, channels) uint8.
      rng: draws the place of the crop.
      padding: width of the borders in pixels; 0 changes nothing.
    """
    place = np.array([[rng.random(), rng.random()]])
    return _crop(image[None], _places(place, padding), padding)[0]


def pad_crop_flip(
    images: np.ndarray, numbers: np.ndarray, padding: int, probability: float
) -> np.ndarray:
    """Applies `pad_and_crop` and a horizontal flip to many images.

    Args:
      images: (n, height, width, channels) uint8; not changed.
      numbers: (n, 3) uniform in [0, 1): the place (y, x) of the crop, and the flip.
      padding: width of the borders in pixels.
      probability: probability of a flip.
    """
    out = _crop(images, _places(numbers[:, :2], padding), padding)
    flip = numbers[:, 2] < probability
    if images.shape[3] == 3:
        for i in np.flatnonzero(flip):  # faster than NumPy for pixels of several bytes
            opencv().flip(out[i], 1, out[i])
    elif flip.any():
        out[flip] = out[flip][:, :, ::-1]
    return out


def _places(numbers: np.ndarray, padding: int) -> np.ndarray:
    return (numbers * (2 * padding + 1)).astype(int)


def _crop(images: np.ndarray, places: np.ndarray, padding: int) -> np.ndarray:
    """Pads images (n, h, w, c) and crops each at its place (y, x): places (n, 2)."""
    n, h, w, c = images.shape
    padded = np.zeros((n, h + 2 * padding, w + 2 * padding, c), np.uint8)
    padded[:, padding : padding + h, padding : padding + w] = images
    image, row, pixel, _ = padded.strides
    shifts = 2 * padding + 1
    # All possible crops as a view, with a row of pixels as one run of bytes.
    crops = np.lib.stride_tricks.as_strided(
        padded, (n, shifts, shifts, h, w * c), (image, row, pixel, row, 1)
    )
    return crops[np.arange(n), places[:, 0], places[:, 1]].reshape(images.shape)
