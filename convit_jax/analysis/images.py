"""The images of an analysis: files, or test images of a data set."""

from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from convit_jax.data import fit
from convit_jax.data.batches.gather import Transform, transformed
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.data.source import Source
from convit_jax.predict.files import find_images, path_of
from convit_jax.predict.preprocess import Preprocess
from convit_jax.train import eval_report, probe, setup
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

Image = tuple[str, np.ndarray]  # name, and pixels (height, width, channels) uint8


def of_files(loaded: Loaded, arguments: Sequence[str]) -> Iterator[Image]:
    """Reads image files as the evaluation of the weights does, one at a time.

    Args:
      loaded: weights of a model with images of 1 or 3 channels.
      arguments: files, folders and patterns, see `find_images`.

    Raises:
      ValueError: if an argument names no image, or a file is not a readable image.
      OSError: if a file cannot be read.
    """
    paths, reasons = find_images(arguments)
    if reasons:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    preprocess = Preprocess(loaded)
    for path in paths:
        data = path_of(path).read_bytes()
        try:
            pixels = preprocess.pixels(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield path, pixels


def of_test_split(
    loaded: Loaded, config: ml_collections.ConfigDict, workdir: Workdir | None, count: int
) -> Iterator[Image]:
    """Reads test images of a data set, spread evenly over it, one at a time.

    They are prepared as the evaluation of the weights does: at their size, with their crop.

    Args:
      loaded: the weights.
      config: the configuration, see `convit_jax.recipe`; its section `data` is read and completed.
      workdir: the workdir of the run whose weights they are; None if they are of no run.
      count: number of images; at most all are read.

    Raises:
      ValueError: if the images do not fit the model.
      OSError: if the data are missing.
      convit_jax.data.corrupt.ImageError: if an image is corrupt or does not fit the model.
    """
    model = loaded.model
    fit.fit_normalisation(config, model.in_channels)
    source = setup.open_split(config, "test", workdir, whole=workdir is None)
    fit.settle_reading(config, source)
    fit.check_fit(config, model, source, any_size=True, any_classes=True)
    transform = EvalTransform(
        model.image_shape[:2], loaded.crop_pct, model.in_channels == 1, fit.reading(config)
    )
    some = probe.spread(source, count)
    yield from of_indices(source, some.indices.tolist(), transform, workdir)


def of_indices(
    source: Source, indices: Sequence[int], transform: Transform, workdir: Workdir | None
) -> Iterator[Image]:
    """Reads chosen images of a data set, one at a time.

    Args:
      source: the data set.
      indices: places of the images in it, each once.
      transform: what is done to the pixels of each.
      workdir: the workdir of a run, which may have an index of the names; None without a run.

    Raises:
      convit_jax.data.corrupt.ImageError: if an image is corrupt or does not fit the transform.
    """
    cache_dir = str(workdir.index) if workdir else None
    for index, name in eval_report.image_names(source, indices, cache_dir).items():
        yield name, transformed(source, index, transform)[0]
