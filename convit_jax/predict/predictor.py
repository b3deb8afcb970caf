"""A compiled classifier of images."""

from collections.abc import Sequence
import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.data import class_names
from convit_jax.model.normalise import normalise
from convit_jax.predict.preprocess import Preprocess
from convit_jax.weights.loaded import Loaded


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class and its probability.

    Attributes:
      name: name of the class.
      index: index of the class among the logits.
      probability: softmax of the logit.
    """

    name: str
    index: int
    probability: float


class Predictor:
    """A classifier of images, compiled for batches of one size.

    predictor = Predictor(read_weights("convit_tiny.safetensors"), batch_size=1)
    predictor.top([predictor.pixels(data)], 5)  # data: the bytes of an image file
    """

    def __init__(self, loaded: Loaded, batch_size: int):
        """Moves the weights to the device and compiles the model.

        Args:
          loaded: weights of a classifier of images with 1 or 3 channels.
          batch_size: number of images in a batch.

        Raises:
          ValueError: if the model is no classifier, or takes another number of channels.
        """
        model = loaded.model
        model.check_classifies(loaded.source)
        self.preprocess = Preprocess(loaded)
        self.names = class_names.readable(loaded.class_names, model.num_classes)
        self.batch_size = batch_size
        self._shape = (batch_size, *model.image_shape)

        def forward(params: Any, images: jax.Array) -> jax.Array:
            images = normalise(images, loaded.mean, loaded.std)
            return jax.nn.softmax(cast(jax.Array, model.apply({"params": params}, images)))

        self._params = jax.device_put(loaded.params)
        images = jax.ShapeDtypeStruct(self._shape, jnp.uint8)
        self._forward = jax.jit(forward).lower(self._params, images).compile()

    def pixels(self, data: bytes) -> np.ndarray:
        """Decodes an image file, and resizes and crops it as in evaluation.

        A model with one input channel gets the image in grey.

        Args:
          data: bytes of the file.

        Returns:
          (height, width, channels) uint8, the input of `top`.

        Raises:
          ValueError: if the file is not a readable image.
        """
        return self.preprocess.pixels(data)

    def batch(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Returns (batch_size, height, width, channels) uint8: the images, and then zeros."""
        batch = np.zeros(self._shape, np.uint8)
        batch[: len(images)] = images
        return batch

    def top(self, images: Sequence[np.ndarray], count: int) -> list[list[Prediction]]:
        """Returns the most probable classes of each image, the most probable first.

        Args:
          images: up to `batch_size` arrays from `pixels`.
          count: number of classes for each image.
        """
        batch = self.batch(images)
        probabilities = np.asarray(self._forward(self._params, batch))[: len(images)]
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :count]
        return [
            [Prediction(self.names[i], int(i), float(row[i])) for i in best]
            for row, best in zip(probabilities, order, strict=True)
        ]
