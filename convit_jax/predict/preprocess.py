"""Preprocessing that belongs to weights: from a picture to the input of their model."""

import os
import pathlib
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from convit_jax.data.images.decode import to_grey
from convit_jax.data.images.reading import AS_SHOWN, pixels_of
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.model.normalise import normalise
from convit_jax.weights.loaded import Loaded

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | os.PathLike | bytes | np.ndarray | Image.Image


class Preprocess:
    """Resizes, crops and normalises pictures as the evaluation of the weights does.

    preprocess = Preprocess(read_weights("convit_base"))
    images = preprocess("photo.jpg", "other.png")    # (2, 224, 224, 3) float32

    A picture is the path of a file, the bytes of one, a picture of Pillow, or uint8 pixels (height,
    width, 1 or 3). A model with one input channel gets it in grey. Files and pictures of Pillow are
    turned upright by their EXIF orientation and put over white, whatever the weights' run did.
    """

    def __init__(self, loaded: Loaded):
        """Takes size, crop, channels, mean and standard deviation from the weights.

        Raises:
          ValueError: if the model takes neither 1 nor 3 channels.
        """
        model = loaded.model
        if model.in_channels not in (1, 3):
            raise ValueError(
                f"{loaded.source}: expected 1 or 3 input channels, got {model.in_channels}"
            )
        self._grey = model.in_channels == 1
        self._transform = EvalTransform(
            model.image_shape[:2], loaded.crop_pct, self._grey, AS_SHOWN
        )
        self._mean, self._std = loaded.mean, loaded.std

    def __call__(self, *pictures: "Picture") -> np.ndarray:
        """Returns the input of the model, (number of pictures, height, width, channels) float32.

        Raises:
          ValueError: if there is no picture, or one cannot be read.
          OSError: if a file cannot be read.
        """
        if not pictures:
            raise ValueError("pictures: expected one or more, got none")
        pixels = np.stack([self.pixels(picture) for picture in pictures])
        return np.asarray(normalise(jnp.asarray(pixels), self._mean, self._std))

    def pixels(self, picture: "Picture") -> np.ndarray:
        """Returns (height, width, channels) uint8: a picture resized and cropped, not normalised.

        Raises:
          ValueError: if the picture cannot be read.
          OSError: if the file cannot be read.
        """
        if isinstance(picture, (str, os.PathLike)):
            picture = pathlib.Path(picture).read_bytes()
        if not isinstance(picture, (bytes, np.ndarray)):
            picture = pixels_of(picture, AS_SHOWN)
        if isinstance(picture, np.ndarray):
            one_channel = picture.ndim == 3 and picture.shape[2] == 1
            three = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
            if self._grey and three:  # the transform refuses what is no image
                picture = to_grey(picture)
            elif one_channel and not self._grey:
                picture = np.repeat(picture, 3, axis=2)
        return self._transform(picture)
