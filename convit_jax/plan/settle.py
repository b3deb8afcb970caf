"""What a run takes from its data, settled without opening them."""

import logging

import ml_collections

from convit_jax.data import fit
from convit_jax.data.synthetic import SyntheticSource
from convit_jax.model.network import ConViT
from convit_jax.train import init_from, setup

log = logging.getLogger(__name__)

_IMAGENET = ("tfds:imagenet2012", "synthetic")  # sources of ImageNet's number of images and classes
IMAGENET_IMAGES = len(SyntheticSource("train"))


def settle(config: ml_collections.ConfigDict, backend: str) -> ConViT:
    """Fills in what the configuration leaves open, and makes its model.

    Args:
      config: the configuration; changed. Weights to start from are read, since they decide the
        model.
      backend: "cpu", "gpu" or "tpu", which the step is compiled for.

    Raises:
      ValueError: if the configuration leaves something to the data.
      OSError: if the weights cannot be read.
    """
    if config.train.batch_size is None:
        raise ValueError(
            "train.batch_size: expected a number, since the data that it would fit are not opened"
        )
    init_from.settle_new_model(config)
    if config.model.num_classes is None and not _is_imagenet(config):
        log.warning(
            "model.num_classes: 1,000, since the data are not opened; --config.model.num_classes=N "
            "sets it"
        )
    model = setup.make_model(config, backend=backend)
    model.check_classifies("training")
    fit.fit_normalisation(config, model.in_channels)
    return model


def _is_imagenet(config: ml_collections.ConfigDict) -> bool:
    return config.data.source.startswith(_IMAGENET)


def training_images(config: ml_collections.ConfigDict) -> int | None:
    """Returns the number of images that a run trains on; None unless they are ImageNet's."""
    if not _is_imagenet(config):
        return None
    return round(IMAGENET_IMAGES * config.data.sampling_ratio)


def describe(config: ml_collections.ConfigDict, model: ConViT) -> str:
    """Returns a line about a model and how a step computes it."""
    teacher = f", teacher={config.distill.teacher}" if config.distill.teacher else ""
    return (
        f"{config.model.name}, {model.dtype}, attention={model.attention}, "
        f"positional={model.positional}, remat={model.remat}, "
        f"accum_steps={config.train.accum_steps}{teacher}"
    )
