"""What the page of a run shows: its record, its metrics, and what its weights do on test images.

`gather` reads and measures. `page` writes the page.
"""

from collections.abc import Iterator
import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from convit_jax.analysis import images, measured
from convit_jax.data import fit
from convit_jax.data.corrupt import ImageError
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.data.source import describe
from convit_jax.predict.attention import draw
from convit_jax.train import eval_report, eval_setup, same_run, setup
from convit_jax.train.eval_report import PerImage
from convit_jax.train.eval_setup import Choices, EvalRun
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir import metric_files, record
from convit_jax.workdir.checkpoints import newest_step
from convit_jax.workdir.folder import Workdir

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_MAPS = 3  # test images whose attention is drawn
_PROBED = 64  # test images over which non-locality is measured, as in `convit analyse`
_MISTAKES = 12
_PANEL = 112  # pixels of the shorter side of an image beside its attention maps, at most


@dataclasses.dataclass(frozen=True)
class Map:
    """A picture of the attention of one query patch of a test image, from `attention.draw`."""

    name: str
    query: tuple[int, int]  # row and column, counted from 1
    layers: list[int]
    picture: "Image.Image"


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A test image that is classified wrongly, with the probabilities of both classes."""

    name: str
    pixels: np.ndarray  # (height, width, channels) uint8
    label: str
    probability: float  # of the label
    predicted: str
    predicted_probability: float


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the weights do on test images.

    Attributes:
      description: what the test images are.
      classes: names of the classes that are evaluated.
      masking: result of each masking, see `measured.evaluate_masked`; the first is of none.
      confusion: see `eval_report.confusion`; rows and columns are in the order of `classes`.
      wrong: number of images that are classified wrongly.
      mistakes: those with the largest loss, the largest first.
      nonlocality: see `measured.measure_nonlocality`.
      maps: the attention in a few images.
    """

    description: str
    classes: list[str]
    masking: list[dict[str, Any]]
    confusion: dict[str, Any]
    wrong: int
    mistakes: list[Mistake]
    nonlocality: dict[str, Any]
    maps: list[Map]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page of a run shows.

    Attributes:
      workdir: folder of the run.
      config: its configuration.
      starts: its starts, see `record.record_start`.
      data: {split: description of its images}; empty for a run of an earlier version.
      metrics: the lines of its metrics.
      step: number of steps that are known to be finished.
      steps_per_epoch, total_steps: None if they are not known.
      loaded: its weights; None if they cannot be read.
      no_weights: why there are no weights.
      tested: None if the test images cannot be evaluated.
      not_tested: why they cannot.
      time: when the report was made.
      versions: {package: version} of those that made it.
    """

    workdir: str
    config: ml_collections.ConfigDict
    starts: list[dict[str, Any]]
    data: dict[str, Any]
    metrics: list[dict[str, Any]]
    step: int
    steps_per_epoch: float | None
    total_steps: int | None
    loaded: Loaded | None
    no_weights: str
    tested: Tested | None
    not_tested: str
    time: str
    versions: dict[str, str]


def gather(
    workdir: Workdir, config: ml_collections.ConfigDict | None = None, ema: bool | None = None
) -> Report | None:
    """Reads what is known of a run, and evaluates its best checkpoint on the test images.

    What cannot be read, such as data that were deleted, is left out; the report says why.

    Args:
      workdir: the workdir of the run, finished or not.
      config: configuration to read the data with; None is that of the run.
      ema: whether to take the averaged weights; None takes them if the run has any.

    Returns:
      The report; None if the evaluation was interrupted.

    Raises:
      FileNotFoundError: if the folder has no run.
      ValueError: if its configuration is not readable, or `ema` is set and the run has no averaged
        weights.
    """
    saved = same_run.config_of_run(workdir)
    if saved is None:
        raise FileNotFoundError(f"{workdir}: expected the workdir of a run (config.json)")
    loaded, tested, no_weights, not_tested = _weights(workdir, config or saved, ema)
    if tested is None and not not_tested:
        return None
    metrics, data = metric_files.read_lines(workdir), record.read_data(workdir)
    steps_per_epoch = total_steps = None
    if "train" in data and saved.train.batch_size:
        steps_per_epoch, total_steps = setup.number_of_steps(saved, data["train"]["images"])
    return Report(
        workdir=str(workdir),
        config=saved,
        starts=record.read_starts(workdir),
        data=data,
        metrics=metrics,
        step=max([*(line["step"] for line in metrics), newest_step(workdir.checkpoints) or 0]),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        loaded=loaded,
        no_weights=no_weights,
        tested=tested,
        not_tested=not_tested,
        time=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        versions=dict(record.versions()),
    )


def _weights(
    workdir: Workdir, config: ml_collections.ConfigDict, ema: bool | None
) -> tuple[Loaded | None, Tested | None, str, str]:
    """Returns the weights and what they do on test images, and for each why it is missing."""
    loaded = tested = None
    no_weights = not_tested = ""
    try:
        prepared = eval_setup.prepare(config, workdir, Choices(ema=ema))
        loaded = prepared.loaded
        tested = _test(prepared)
    except (OSError, ValueError, ImportError, ImageError) as error:
        not_tested = str(error)
        log.warning("the page has nothing of the test images: %s", error)
    if loaded is None:  # the data are gone, or there are no weights
        try:
            loaded = read_weights(workdir.path, ema=ema)
        except OSError as error:
            no_weights = str(error)
            log.warning("the page has nothing of the weights: %s", error)
    return loaded, tested, no_weights, not_tested


def _test(prepared: EvalRun) -> Tested | None:
    """Evaluates weights on the test images; None if it was interrupted."""
    config, loaded, source = prepared.config, prepared.loaded, prepared.source
    setup.use_compilation_cache(config, prepared.workdir)
    found = measured.evaluate_masked(prepared, None)
    if found is None:
        return None
    masked, per_image = found
    model = loaded.model
    transform = EvalTransform(
        model.image_shape[:2], config.augment.eval_crop, model.in_channels == 1, fit.reading(config)
    )

    def read(count: int) -> Iterator[images.Image]:
        """Reads images that are spread evenly over those that were evaluated."""
        there = per_image["index"]
        places = np.unique(np.linspace(0, len(there) - 1, count).astype(int))
        chosen = there[places].tolist()
        return images.of_indices(source, chosen, transform, prepared.workdir)

    wrong = np.flatnonzero(per_image["rank"] != 1)
    losses = np.nan_to_num(per_image["losses"][wrong], nan=math.inf)
    worst = wrong[np.argsort(-losses, kind="stable")[:_MISTAKES]]
    indices = per_image["index"][worst].tolist()
    pictures = images.of_indices(source, indices, transform, prepared.workdir)
    classes = prepared.classes
    return Tested(
        description=describe(source),
        classes=[classes.names[i] for i in classes.kept],
        masking=masked,
        confusion=eval_report.confusion(per_image, classes),
        wrong=len(wrong),
        mistakes=[
            _mistake(per_image, place, name, pixels, classes.names)
            for place, (name, pixels) in zip(worst, pictures, strict=True)
        ],
        nonlocality=measured.measure_nonlocality(loaded, read(_PROBED)),
        maps=_maps(loaded, list(read(_MAPS))),
    )


def _mistake(
    per_image: PerImage, place: int, name: str, pixels: np.ndarray, names: tuple[str, ...]
) -> Mistake:
    return Mistake(
        name=name,
        pixels=pixels,
        label=names[per_image["label"][place]],
        probability=float(np.exp(-per_image["losses"][place])),
        predicted=names[per_image["predictions"][place, 0]],
        predicted_probability=float(per_image["probabilities"][place, 0]),
    )


def _maps(loaded: Loaded, some: list[images.Image]) -> list[Map]:
    """Draws the attention of the central patch in four layers at most."""
    depth, gpsa = loaded.model.depth, loaded.model.local_up_to_layer
    last = gpsa or depth
    layers = sorted({1, (last + 1) // 2, last, depth})
    found = measured.measure_maps(loaded, some, layers=layers)["maps"]
    drawn = []
    for (name, pixels), of_query in zip(some, found, strict=True):
        row, column = of_query["query"]
        picture = draw(
            _small(pixels),
            np.asarray(of_query["attention"]),
            every_head=True,
            query=(row - 1, column - 1),
        )
        drawn.append(Map(name, (row, column), layers, picture))
    return drawn


def _small(pixels: np.ndarray) -> np.ndarray:
    """Returns an image whose shorter side has at most `_PANEL` pixels."""
    from PIL import Image

    height, width, channels = pixels.shape
    factor = _PANEL / min(height, width)
    if factor >= 1:
        return pixels
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    resized = image.resize((round(width * factor), round(height * factor)))
    return np.asarray(resized).reshape(resized.height, resized.width, channels)
