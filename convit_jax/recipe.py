"""The recipe: every configuration key once, with its unit, its default and its source.

The defaults are DeiT's recipe (Touvron et al. 2021, arXiv:2012.12877, Table 9), which the ConViT
paper keeps unchanged for Ti, S and B. The files of `configs/` say what differs for one model or
data set, in a few lines:

    from convit_jax import recipe

    def get_config():
        config = recipe.get_config()
        config.train.batch_size = 256
        return config

Any key can be set on the command line: `--config.train.batch_size=256`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import math
from typing import Any

import ml_collections
from ml_collections import config_dict

from convit_jax.model import image_size
from convit_jax.model.normalise import IMAGENET_MEAN, IMAGENET_STD
from convit_jax.model.variants import VARIANTS, options_of_kind

# Counts the changes of this file that a saved configuration cannot follow by taking defaults;
# `from_json` knows how to read every earlier one.
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
      default: its value unless a configuration says otherwise; None leaves it open.
      doc: what it is, with its unit.
      type: of its values; by default that of `default`.
      choices: the values allowed; () allows all of the type.
      above: an exclusive lower bound.
      least: an inclusive lower bound.
      below: an exclusive upper bound.
      may_change: whether it may differ between two starts of a run: what a run costs, how long it
        is, where things are, and what it shows and saves.
    """

    default: Any
    doc: str
    type: Any = None
    choices: tuple[Any, ...] = ()
    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    may_change: bool = False


def _option(doc: str, type_: Any, name: str) -> Key:
    """A key of the model that is left to the model's name by default."""
    return Key(None, doc, type_, may_change=name in options_of_kind("computation"))


KEYS: dict[str, Key] = {
    "seed": Key(0, "seed of the initialisation, the order of the data, augmentation and dropout"),
    "compilation_cache": Key(
        "workdir",
        "folder of compiled programs, which make a restart quick; workdir: in it; empty: none",
        may_change=True,
    ),
    "mesh.fsdp": Key(
        1,
        "devices over which parameters and optimiser state are split; 1: none",
        may_change=True,
    ),
    "checkpoint.every": Key(
        1000,
        "steps between two checkpoints; each evaluation and interruption saves too",
        above=0,
        may_change=True,
    ),
    "checkpoint.keep": Key(
        2, "newest checkpoints to keep; the best by top-1 stays too", above=0, may_change=True
    ),
    "init_from": Key("", "weights to start from, whatever convit_jax.load reads; empty: random"),
    "init_ema": Key(False, "with init_from: take its averaged weights"),
    "init_new_head": Key(False, "with init_from: start the head anew, for other classes"),
    "init_resize_pos_embed": Key(
        False, "with init_from: interpolate the position embedding to another image size"
    ),
    "init_adapt_channels": Key(False, "with init_from: sum or repeat RGB for other in_channels"),
    # The options of convit_jax.ConViT; those that are None are what the model's name stands for.
    "model.name": Key("convit_base", "one of convit_jax.VARIANTS", choices=tuple(VARIANTS)),
    "model.num_classes": _option("number of classes; None: the data's", int, "num_classes"),
    "model.image_size": Key(224, "pixels: 224 is a square, 224x320 height x width", type=object),
    "model.drop_path": Key(0.1, "stochastic depth: rate of the last block, rising from 0"),
    "model.dropout": Key(0.0, "rate of dropout in attention outputs and MLPs"),
    "model.attn_dropout": Key(0.0, "rate of dropout on attention maps"),
    "model.in_channels": _option("channels of the images", int, "in_channels"),
    "model.patch_size": _option("side of a patch in pixels", int, "patch_size"),
    "model.embed_dim": _option("width", int, "embed_dim"),
    "model.depth": _option("number of blocks", int, "depth"),
    "model.num_heads": _option("number of attention heads", int, "num_heads"),
    "model.mlp_ratio": _option("hidden width of the MLPs over the width", float, "mlp_ratio"),
    "model.qkv_bias": _option("bias of the q, k, v projections", bool, "qkv_bias"),
    "model.qk_scale": _option("factor of the content scores", float, "qk_scale"),
    "model.local_up_to_layer": _option("number of GPSA blocks", int, "local_up_to_layer"),
    "model.locality_strength": _option("the paper's alpha", float, "locality_strength"),
    "model.use_local_init": _option("convolutional initialisation", bool, "use_local_init"),
    "model.use_pos_embed": _option("learned position embedding", bool, "use_pos_embed"),
    "model.cls_pos_embed": _option("position of the class token, DeiT's", bool, "cls_pos_embed"),
    "model.global_pool": _option("token or avg", str, "global_pool"),
    "model.attention": _option("auto, xla, chunked or cudnn", str, "attention"),
    "model.positional": _option("auto, blend or contract", str, "positional"),
    "model.unroll": _option("layers in one iteration of the scan", int, "unroll"),
    "data.source": Key("tfds:imagenet2012", "tfds:NAME, folder:PATH or digits"),
    "data.dir": Key(
        "",
        "folder of tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
        may_change=True,
    ),
    "data.val_fraction": Key(0.1, "share of each class held out of a folder without val/"),
    "data.sampling_ratio": Key(1.0, "share of each class to train on (ConViT, Table 2)"),
    "data.epochs_scale": Key(
        1.0,
        "factor of train.epochs; 1 / sampling_ratio keeps the number of images seen",
        above=0,
        may_change=True,
    ),
    "data.repeats": Key(3, "draws of an image in a row, repeated augmentation; 1: off", above=0),
    "data.skip_corrupt": Key(
        False, "train on other images in place of corrupt ones", may_change=True
    ),
    "data.workers": Key(
        None, "processes that make batches; None: one a core, none for digits", int, may_change=True
    ),
    "data.mean": Key(IMAGENET_MEAN, "mean of each channel, of values in [0, 1]"),
    "data.std": Key(IMAGENET_STD, "standard deviation of each channel"),
    # On the host: convit_jax/data/transforms.py.
    "augment.crop": Key("random_resized", "random_resized, pad or none"),
    "augment.scale": Key((0.08, 1.0), "range of a crop's share of the image's area"),
    "augment.ratio": Key((3 / 4, 4 / 3), "range of a crop's width over its height"),
    "augment.pad_crop": Key(0, "pixels on every side, with crop=pad"),
    "augment.flip": Key(0.5, "probability of a horizontal flip"),
    "augment.randaugment_ops": Key(2, "operations an image; 0: off"),
    "augment.randaugment_magnitude": Key(9.0, "mean magnitude, 0 to 10"),
    "augment.randaugment_std": Key(0.5, "standard deviation of the magnitude"),
    "augment.color_jitter": Key(0.4, "strength of colour jitter; used if RandAugment is off"),
    "augment.eval_crop": Key(0.875, "share of the resized image's side that evaluation keeps"),
    "augment.backend": Key("fast", "fast (OpenCV) or exact (Pillow, timm's pixels)"),
    # On the device: convit_jax/train/augmentation.py.
    "mixup.mixup": Key(0.8, "alpha of Beta(alpha, alpha) for mixup; 0: off"),
    "mixup.cutmix": Key(1.0, "alpha of Beta(alpha, alpha) for CutMix; 0: off"),
    "mixup.prob": Key(1.0, "probability that a group is mixed"),
    "mixup.switch_prob": Key(0.5, "probability of CutMix where both are on"),
    "mixup.group_size": Key(128, "images that share a lambda: DeiT's batch on one GPU"),
    "mixup.erase_prob": Key(0.25, "probability that a box of an image is erased"),
    "mixup.erase_mode": Key("pixel", "pixel, const or rand"),
    "train.epochs": Key(300.0, "epochs", above=0, may_change=True),
    "train.batch_size": Key(1024, "images of a step over all devices"),
    "train.accum_steps": Key(
        1, "parts of a batch computed in turn, for one update", above=0, may_change=True
    ),
    "train.label_smoothing": Key(0.1, "share of a label spread over all classes"),
    "train.dtype": Key(
        "auto",
        "type of matrix products; auto: bfloat16 on GPU and TPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
        may_change=True,
    ),
    "train.remat": Key(
        "dots",
        "what the backward pass computes again: none, dots (the cheap parts) or block (all)",
        may_change=True,
    ),
    "train.log_every": Key(50, "steps between two lines of metrics", above=0, may_change=True),
    "train.eval_every": Key(
        1.0, "epochs between two evaluations; the last step has one", above=0, may_change=True
    ),
    # AdamW.
    "optim.lr": Key(
        5e-4,
        "peak learning rate for 512 images; scaled by batch_size / 512",
        above=0,
        may_change=True,  # what the error of a loss that is not finite advises
    ),
    "optim.warmup_lr": Key(1e-6, "learning rate at the start; not scaled, as in the original"),
    "optim.min_lr": Key(1e-5, "learning rate at the end; not scaled"),
    "optim.warmup_epochs": Key(5.0, "epochs of linear warm-up"),
    "optim.b1": Key(0.9, "decay of the first moment, for each step"),
    "optim.b2": Key(0.999, "decay of the second moment, for each step"),
    "optim.eps": Key(1e-8, "added to the root of the second moment"),
    "optim.weight_decay": Key(
        0.05, "decay of matrices; biases, norms, gates and embeddings have none", least=0
    ),
    "optim.clip_norm": Key(0.0, "largest norm of all gradients; 0: off, as in DeiT", least=0),
    "optim.ema_decay": Key(
        0.0, "decay of the averaged weights, for each step; 0: off; DeiT's: 0.99996",
        least=0, below=1,
    ),
}  # fmt: skip

MAY_CHANGE = frozenset(name for name, key in KEYS.items() if key.may_change)


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: a configuration with every key at its default."""
    config = ml_collections.ConfigDict()
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        value = key.default
        if value is None or key.type is not None:
            value = config_dict.FieldReference(value, field_type=key.type)
        (config[section] if section else config)[leaf] = value
    return config


def paper(name: str) -> ml_collections.ConfigDict:
    """Returns the recipe of one of the paper's models, trained on ImageNet.

    The paper trains its "+" models with a smaller batch and a lower learning rate.
    """
    config = get_config()
    config.model.name = name
    if name.endswith("_plus"):
        config.train.batch_size = 512
        config.optim.lr = 4e-4
    return config


def cifar(
    source: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> ml_collections.ConfigDict:
    """Returns settings for images of 32 x 32 pixels: ours, since the paper has no results on them.

    Args:
      source: of the data.
      mean, std: of each channel.
    """
    config = get_config()
    config.model.update(name="convit_tiny", image_size=32, patch_size=4)
    config.data.update(source=source, repeats=1, mean=mean, std=std)
    config.augment.update(crop="pad", pad_crop=4, eval_crop=1.0)
    config.train.batch_size = 512
    return config


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError naming every key that is unknown, missing or has a wrong value."""
    problems = list(_misfits(config, get_config(), ""))
    if problems:
        raise ValueError(
            "the configuration does not fit convit_jax/recipe.py:\n  " + "\n  ".join(problems)
        )


def _misfits(
    config: ml_collections.ConfigDict, reference: ml_collections.ConfigDict, path: str
) -> Iterator[str]:
    found, known = set(config.keys()), set(reference.keys())
    for leaf in sorted(found - known):
        close = difflib.get_close_matches(leaf, known, n=1)
        hint = f"did you mean {path}{close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        yield f"unknown key: {path}{leaf} ({hint})"
    for leaf in sorted(known - found):
        yield f"missing key: {path}{leaf}"
    for leaf in sorted(known & found):
        name, value = f"{path}{leaf}", config[leaf]
        expected = reference.get_type(leaf)
        if expected is ml_collections.ConfigDict and isinstance(value, expected):
            yield from _misfits(value, reference[leaf], f"{name}.")
        elif name == "model.image_size":
            try:
                image_size.parse(value, name)
            except ValueError as error:
                yield str(error)
        elif value is None and reference[leaf] is None:
            pass  # left open
        elif type(value) is not expected and (type(value), expected) != (int, float):
            yield f"{name}: expected {expected.__name__}, got {value!r}"
        else:
            yield from _out_of_bounds(name, value)


def _out_of_bounds(name: str, value: Any) -> Iterator[str]:
    key = KEYS[name]
    if key.choices and value not in key.choices:
        yield f"{name}: expected one of {key.choices}, got {value!r}"
    if not isinstance(value, (int, float)):
        return
    if not value > key.above:
        yield f"{name}: expected more than {key.above:g}, got {value}"
    if not value >= key.least:
        yield f"{name}: expected {key.least:g} or more, got {value}"
    if not value < key.below:
        yield f"{name}: expected less than {key.below:g}, got {value}"


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a configuration as JSON's types, with the version of its format."""
    values = config.copy_and_resolve_references().to_dict()
    return {"format_version": FORMAT_VERSION, **values}


def from_json(saved: Mapping[str, Any], where: str) -> ml_collections.ConfigDict:
    """Reads the configuration of a run that this version or an earlier one has saved.

    A key that did not exist yet takes its default.

    Args:
      saved: what `to_json` returned, after a way through JSON.
      where: names the file in errors.

    Raises:
      ValueError: if it is not a configuration, or one of a later version.
    """
    values = dict(saved)
    version = values.pop("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: written by a later version of convit_jax (format {version}; this one reads "
            f"up to {FORMAT_VERSION}): pip install --upgrade convit-jax"
        )
    config = get_config()
    try:
        for name, value in _leaves(values):
            _set(config, name, tuple(value) if isinstance(value, list) else value)
        if version < 2 and isinstance(config.model.image_size, tuple):  # (height, width) there
            config.model.image_size = image_size.text(config.model.image_size)
        check(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not the configuration of a run: {error}") from None
    return config


def changes_since(saved: Mapping[str, Any], config: ml_collections.ConfigDict) -> list[str]:
    """Returns what this version computes otherwise than the one that saved a configuration."""
    mixes = config.mixup.prob > 0 and max(config.mixup.mixup, config.mixup.cutmix) > 0
    if saved.get("format_version", 1) < 2 and mixes:
        return [
            "mixup.group_size: groups were consecutive images, now every image of a row is in "
            "another group"
        ]
    return []


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for leaf, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{leaf}.")
        else:
            yield f"{path}{leaf}", value


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    if name not in KEYS:
        raise ValueError(f"unknown key: {name}")
    section, _, leaf = name.rpartition(".")
    (config[section] if section else config)[leaf] = value


def differences(
    saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> dict[str, str]:
    """Returns what differs between two configurations: key -> text with both values."""
    there, now = dict(_leaves(saved.to_dict())), dict(_leaves(config.to_dict()))
    return {
        name: f"{name}: there {there.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    }
