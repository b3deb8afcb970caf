"""Classification of image files: the library behind `convit predict`."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import glob
import itertools
import os
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.data import class_names
from convit_jax.data.folders.listing import EXTENSIONS, walk
from convit_jax.data.images.decode import decode
from convit_jax.data.images.reading import AS_SHOWN
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.model.normalise import normalise
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
        if model.in_channels not in (1, 3):
            raise ValueError(
                f"{loaded.source}: expected 1 or 3 input channels, got {model.in_channels}"
            )
        self.names = class_names.readable(loaded.class_names, model.num_classes)
        self.batch_size = batch_size
        self._transform = EvalTransform(model.image_shape[:2], loaded.crop_pct, AS_SHOWN)
        self._grey = model.in_channels == 1
        self._shape = (batch_size, *model.image_shape)

        def forward(params: Any, images: jax.Array) -> jax.Array:
            images = normalise(images, loaded.mean, loaded.std)
            return jax.nn.softmax(cast(jax.Array, model.apply({"params": params}, images)))

        self._params = jax.device_put(loaded.params)
        images = jax.ShapeDtypeStruct(self._shape, jnp.uint8)
        self._forward = jax.jit(forward).lower(self._params, images).compile()

    def pixels(self, data: bytes) -> np.ndarray:
        """Decodes an image file as viewers show it, and resizes and crops it as in evaluation.

        A model with one input channel gets the image in grey.

        Args:
          data: bytes of the file.

        Returns:
          (height, width, channels) uint8, the input of `top`.

        Raises:
          ValueError: if the file is not a readable image.
        """
        if not self._grey:
            return self._transform(data)
        from PIL import Image

        grey = np.asarray(Image.fromarray(decode(data, AS_SHOWN)).convert("L"))
        return self._transform(grey[..., None])

    def top(self, images: Sequence[np.ndarray], count: int) -> list[list[Prediction]]:
        """Returns the most probable classes of each image, the most probable first.

        Args:
          images: up to `batch_size` arrays from `pixels`.
          count: number of classes for each image.
        """
        batch = np.zeros(self._shape, np.uint8)
        batch[: len(images)] = images
        probabilities = np.asarray(self._forward(self._params, batch))[: len(images)]
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :count]
        return [
            [Prediction(self.names[i], int(i), float(row[i])) for i in best]
            for row, best in zip(probabilities, order, strict=True)
        ]


def find_images(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Finds the image files that the arguments of a command line name.

    Args:
      arguments: files, with any extension; folders, searched at any depth for files that have one
        of the `EXTENSIONS` and are not hidden; or patterns such as "photos/*.jpg" and
        "photos/**/*.jpg".

    Returns:
      The paths in the order of the arguments, sorted within each argument and without repetition;
      and {argument: reason} for the arguments that name no image.
    """
    paths, reasons = [], {}
    for argument in arguments:
        if os.path.isdir(argument):
            reason = f"no images in this folder ({', '.join(EXTENSIONS)})"
            try:
                found = [os.path.join(argument, name) for name in walk(argument).images]
            except OSError as error:  # the folder, or one in it, cannot be read
                found, reason = [], str(error)
        elif glob.has_magic(argument) and not os.path.exists(argument):
            found = [path for path in glob.glob(argument, recursive=True) if os.path.isfile(path)]
            reason = "no file matches this pattern"
        else:
            found, reason = [argument], ""  # a missing file is reported when it is read
        if not found:
            reasons[argument] = reason
        paths += sorted(found)
    return list(dict.fromkeys(paths)), reasons


def predict_files(
    predictor: Predictor, paths: Iterable[str], count: int = 5
) -> Iterator[tuple[str, list[Prediction] | str]]:
    """Classifies image files, which threads read and decode ahead of the model.

    Args:
      predictor: the classifier.
      paths: the files.
      count: number of classes for each image.

    Yields:
      (path, predictions), or (path, reason) if the file cannot be read, in the order of the paths.
    """

    def read(path: str) -> np.ndarray | str:
        try:
            return predictor.pixels(pathlib.Path(path).read_bytes())
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    def classified(files: list[tuple[str, np.ndarray | str]]) -> Iterator[tuple[str, Any]]:
        images = [image for _, image in files if not isinstance(image, str)]
        found = iter(predictor.top(images, count) if images else ())
        for path, image in files:
            yield path, image if isinstance(image, str) else next(found)

    files: list[tuple[str, np.ndarray | str]] = []
    for path, image in _ahead(read, paths, 2 * predictor.batch_size):
        files.append((path, image))
        if sum(not isinstance(image, str) for _, image in files) == predictor.batch_size:
            yield from classified(files)
            files = []
    yield from classified(files)


def _ahead(function: Any, items: Iterable[str], count: int) -> Iterator[tuple[str, Any]]:
    """Yields (item, function(item)) in order; threads compute up to `count` items ahead."""
    items = iter(items)
    with futures.ThreadPoolExecutor() as pool:
        running = collections.deque(
            (item, pool.submit(function, item)) for item in itertools.islice(items, count)
        )
        while running:
            item, future = running.popleft()
            running.extend((x, pool.submit(function, x)) for x in itertools.islice(items, 1))
            yield item, future.result()
