"""Image transforms on the host: each a function of (image, rng), uint8 in and out."""

import numpy as np


def pad_and_crop(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
    """Shifts an image at random: black borders on all sides, then a crop of the old size.

    The augmentation of CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2), without the flip.

    Args:
      image: (height, width, channels).
      rng: draws the place of the crop.
      padding: width of the borders in pixels; 0 changes nothing.
    """
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    y, x = rng.integers(0, 2 * padding + 1, size=2)
    return padded[y : y + height, x : x + width]
