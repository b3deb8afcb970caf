"""The recipe: every configuration key once, with its unit, its default and its source.

The defaults are DeiT's recipe (Touvron et al. 2021, arXiv:2012.12877, Table 9), which the ConViT
paper keeps unchanged for Ti, S and B. Each file of `configs/` changes what differs for one model or
data set, in a few lines:

    from convit_jax import recipe

    def get_config():
        config = recipe.get_config()
        config.train.batch_size = 256
        return config

A parameter of this function is a choice, which follows the name and a colon in --config.

Any key can be set on the command line: `--config.train.batch_size=256`.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import math
from typing import Any

import ml_collections
from ml_collections import config_dict

from convit_jax.model import image_size
from convit_jax.model.normalise import IMAGENET_MEAN, IMAGENET_STD
from convit_jax.model.variants import VARIANTS, options_of_kind


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
      default: the value of the recipe. None leaves the value to the model's name, or to the rule
        that `doc` states.
      doc: the meaning of the key, with its unit.
      type: type of the values; None means the type of `default`.
      choices: allowed values; () allows all values of the type.
      above: exclusive lower bound.
      least: inclusive lower bound.
      below: exclusive upper bound.
      most: inclusive upper bound.
      may_change: whether the value may differ between two starts of a run. This holds for keys that
        decide what a run costs, how long it is, and what it logs and saves, and for those that an
        error message advises to change.
      may_be_none: whether None is allowed although the default is another value.
    """

    default: Any
    doc: str
    type: Any = None
    choices: tuple[Any, ...] = ()
    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf
    may_change: bool = False
    may_be_none: bool = False


DEFAULT_MODEL = "convit_base"  # where neither model.name nor weights decide


def _option(doc: str, type_: Any, name: str) -> Key:
    """Returns a key of the model that is open by default: the variant or the data decide it."""
    return Key(None, doc, type_, may_change=name in options_of_kind("computation"))


KEYS: dict[str, Key] = {
    "seed": Key(0, "seed of the initialisation, the order of the data, augmentation and dropout"),
    "compilation_cache": Key(
        "workdir",
        "folder of compiled programs, for quick restarts; \"workdir\" stands for "
        "WORKDIR/compilation_cache; empty is off",
        may_change=True,
    ),
    "mesh.fsdp": Key(
        1,
        "number of devices over which parameters and optimiser state are sharded; 1 is off",
        may_change=True,
    ),
    "checkpoint.every": Key(
        1000,
        "steps between two checkpoints; every evaluation and interruption saves one too",
        above=0,
        may_change=True,
    ),
    "checkpoint.keep": Key(
        2,
        "number of newest checkpoints kept, besides the best by top-1 and the best by that of the "
        "averaged weights",
        above=0,
        may_change=True,
    ),
    "init_from": Key(
        "",
        "weights to start from, any source of convit_jax.load; they decide the keys of model that "
        "are open; empty is random",
    ),
    "init_ema": Key(False, "whether to start from the averaged weights of init_from"),
    "init_new_head": Key(False, "whether to replace the head of init_from, for other classes"),
    "init_resize_pos_embed": Key(
        False, "whether to interpolate the position embedding of init_from to another image size"
    ),
    "init_adapt_channels": Key(
        False, "whether to sum or repeat RGB weights of init_from for other in_channels"
    ),
    # The options of convit_jax.ConViT. Where a value is None, the model's name decides, or the
    # weights of init_from if the name is None too.
    "model.name": Key(
        None,
        "model, one of convit_jax.VARIANTS; None means the model of init_from, or convit_base "
        "without weights",
        str, choices=tuple(VARIANTS),
    ),
    "model.num_classes": _option("number of classes; None means the data's", int, "num_classes"),
    "model.image_size": Key(
        224,
        "pixels, 224 or 224x320 (height x width); None means the size of init_from, or 224 without "
        "weights",
        type=object, may_be_none=True,
    ),
    "model.drop_path": Key(0.1, "rate of stochastic depth in the last block, rising from 0"),
    "model.dropout": Key(0.0, "dropout rate of attention outputs and in MLPs"),
    "model.attn_dropout": Key(0.0, "dropout rate of attention maps"),
    "model.in_channels": _option(
        "number of channels of the images; 1 reads image files in grey", int, "in_channels"
    ),
    "model.patch_size": _option("side of a patch in pixels", int, "patch_size"),
    "model.embed_dim": _option("width of the model", int, "embed_dim"),
    "model.depth": _option("number of blocks", int, "depth"),
    "model.num_heads": _option("number of attention heads", int, "num_heads"),
    "model.mlp_ratio": _option("hidden width of MLPs divided by embed_dim", float, "mlp_ratio"),
    "model.qkv_bias": _option("whether q, k, v projections have biases", bool, "qkv_bias"),
    "model.qk_scale": _option("factor of the content scores", float, "qk_scale"),
    "model.local_up_to_layer": _option("number of GPSA blocks", int, "local_up_to_layer"),
    "model.locality_strength": _option("the paper's alpha", float, "locality_strength"),
    "model.use_local_init": _option("convolutional initialisation of GPSA", bool, "use_local_init"),
    "model.gate_init": _option("gates before training, without sigmoid", float, "gate_init"),
    "model.use_pos_embed": _option("learned position embedding", bool, "use_pos_embed"),
    "model.cls_pos_embed": _option("class token position embedding (DeiT)", bool, "cls_pos_embed"),
    "model.global_pool": _option("what is classified: token or avg", str, "global_pool"),
    "model.attention": _option("auto, xla, chunked, cudnn or fused (TPU)", str, "attention"),
    "model.positional": _option("positional part: auto, blend or contract", str, "positional"),
    "model.unroll": _option("number of layers in one iteration of the scan", int, "unroll"),
    "model.flat_tokens": _option(
        "whether linear layers see images and tokens as one axis; None means True on a CPU",
        bool, "flat_tokens",
    ),
    "data.source": Key(
        "tfds:imagenet2012",
        "data set: tfds:NAME, folder:PATH, digits, mnist5k or synthetic (random pictures)",
    ),
    "data.dir": Key(
        "",
        "folder of tfds data sets, local, gs:// or s3://; empty is $TFDS_DATA_DIR, or "
        "~/tensorflow_datasets if unset",
        may_change=True,
    ),
    "data.cache": Key(
        "",
        "folder on a local disk to which the shards of a tfds data set are copied once, and where "
        "they are read; empty reads them where they are",
        may_change=True,
    ),
    "data.val_fraction": Key(
        0.1, "share held out of class folders, or of a tfds data set, that have no other split"
    ),
    "data.held_out": Key(
        "hash",
        "rule that chooses the images held out: hash (of CLASS/FILE), or spread (evenly over "
        "the sorted names of each class, as in runs before format 3)",
        choices=("hash", "spread"),
    ),
    "data.train_split": Key("", "name of the split or folder to train on; empty is train"),
    "data.test_split": Key(
        "", "name of the split or folder to evaluate on; empty is validation, or test without it"
    ),
    "data.class_order": Key(
        "sorted",
        "order of class folders: sorted, natural (2 before 10), or a file with a class a line",
    ),
    "data.sampling_ratio": Key(1.0, "share of each class used for training (ConViT, Table 2)"),
    "data.epochs_scale": Key(
        1.0,
        "factor of train.epochs; 1 / sampling_ratio keeps the number of images seen unchanged",
        above=0,
        may_change=True,
    ),
    "data.repeats": Key(
        3, "times each image is drawn in a row, for repeated augmentation; 1 is off", above=0
    ),
    "data.skip_corrupt": Key(
        False,
        "whether training takes other images in place of corrupt ones, and evaluation leaves "
        "corrupt ones out",
        may_change=True,
    ),
    "data.exif": Key(
        None,
        "whether images are turned upright, as their EXIF orientation says; None means yes for "
        "class folders, and no, as timm does, for tfds data sets and folders of ImageNet's classes",
        bool,
    ),
    "data.alpha": Key(
        None,
        "transparent pixels: white puts the image over white, drop shows the colours stored under "
        "them, as timm does; None means white for class folders, and drop for tfds data sets and "
        "folders of ImageNet's classes",
        str,
        choices=("white", "drop"),
    ),
    "data.workers": Key(
        None, "processes that make batches; None means one per CPU that it may use, 0 for digits",
        int, may_change=True,
    ),
    "data.mean": Key(IMAGENET_MEAN, "mean of each channel, of values in [0, 1]"),
    "data.std": Key(IMAGENET_STD, "standard deviation of each channel, of values in [0, 1]"),
    # Augmentation on the host: convit_jax/data/images/transforms.py.
    "augment.crop": Key("random_resized", "kind of crop: random_resized, pad or none"),
    "augment.scale": Key((0.08, 1.0), "range of a crop's share of the image's area"),
    "augment.ratio": Key((3 / 4, 4 / 3), "range of a crop's width over its height"),
    "augment.pad_crop": Key(0, "width in pixels of the borders added by crop=pad"),
    "augment.flip": Key(0.5, "probability of a horizontal flip"),
    "augment.randaugment_ops": Key(2, "RandAugment operations per image; 0 is off"),
    "augment.randaugment_magnitude": Key(9.0, "mean magnitude of RandAugment, 0 to 10"),
    "augment.randaugment_std": Key(0.5, "standard deviation of RandAugment's magnitude"),
    "augment.color_jitter": Key(0.4, "strength of colour jitter; used if RandAugment is off"),
    "augment.eval_crop": Key(0.875, "share of the resized image's side that evaluation keeps"),
    "augment.backend": Key("fast", "image library: fast (OpenCV) or exact (Pillow, timm's pixels)"),
    # Augmentation on the device: convit_jax/train/augmentation.py.
    "mixup.mixup": Key(0.8, "alpha of Beta(alpha, alpha) for mixup; 0 is off"),
    "mixup.cutmix": Key(1.0, "alpha of Beta(alpha, alpha) for CutMix; 0 is off"),
    "mixup.prob": Key(1.0, "probability that a group of images is mixed"),
    "mixup.switch_prob": Key(0.5, "probability of CutMix if mixup and CutMix are both on"),
    "mixup.group_size": Key(128, "images mixed with the same lambda; DeiT's batch on one GPU"),
    "mixup.erase_prob": Key(0.25, "probability that a box of an image is erased"),
    "mixup.erase_mode": Key("pixel", "content of the erased box: pixel, const or rand"),
    "train.epochs": Key(300.0, "number of epochs", above=0, may_change=True),
    "train.batch_size": Key(
        1024,
        "number of images per step, over all devices; None fits small data sets: up to 64, with at "
        "least 8 steps in an epoch, and one image a device",
        int, may_be_none=True,
    ),
    "train.accum_steps": Key(
        1, "number of parts of a batch, computed in turn for one update", above=0, may_change=True
    ),
    "train.label_smoothing": Key(0.1, "share of a label spread evenly over all classes"),
    "train.dtype": Key(
        "auto",
        "dtype of matrix products; auto is bfloat16 on GPU and TPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
        may_change=True,
    ),
    "train.remat": Key(
        "dots",
        "what the backward pass recomputes: none, dots (all but matrix products and attention), "
        "mlp (the MLPs' hidden layers too) or block (all)",
        may_change=True,
    ),
    "train.log_every": Key(
        50, "steps between two lines of metrics, at most an epoch", above=0, may_change=True
    ),
    "train.eval_every": Key(
        1.0, "epochs between two evaluations; the last step is evaluated too", above=0,
        may_change=True,
    ),
    "train.probe_images": Key(
        None,
        "test images on which each evaluation measures gates and non-locality (ConViT, figures 5 "
        "and 6); 0 is off; None means 32, or 1% of the images trained on between two evaluations "
        "if that is fewer",
        int, least=0, may_change=True,
    ),
    # Distillation: convit_jax/train/distillation.py.
    "distill.teacher": Key(
        "",
        "network whose answers are learned besides the labels: any source of convit_jax.load, or a "
        ".stablehlo file; empty is none; another path of the same teacher (distill.sha256) is "
        "allowed",
        may_change=True,
    ),
    "distill.kind": Key(
        "hard",
        "what is learned of the teacher: hard, its most probable class, or soft, its probabilities",
        choices=("hard", "soft"),
    ),
    "distill.alpha": Key(
        0.5, "share of the teacher in the loss; the labels have the rest", above=0, most=1
    ),
    "distill.tau": Key(1.0, "temperature of the probabilities of distill.kind=soft", above=0),
    "distill.sha256": Key(
        "",
        "SHA-256 of the teacher: of weights with their options, classes and normalisation, or of "
        "a .stablehlo file; empty takes any teacher and is filled in",
    ),
    # The optimiser, AdamW.
    "optim.lr": Key(
        5e-4,
        "peak learning rate; for 512 images per step if optim.scale_lr",
        above=0,
        may_change=True,  # the error of a loss that is not finite advises to lower it
    ),
    "optim.scale_lr": Key(
        True, "whether the peak is optim.lr x batch_size / 512, as in DeiT, or optim.lr itself"
    ),
    "optim.layer_decay": Key(
        1.0,
        "factor of the learning rate from each block to the block before it, as in timm; 1 is off",
        above=0,
    ),
    "optim.freeze": Key(
        "",
        "parameters not to train: backbone (all but the head), gates, positional, gpsa (the "
        "attention of the GPSA layers), or regular expressions of whole names such as "
        "gpsa_blocks/.*, separated by commas",
    ),
    "optim.freeze_epochs": Key(
        0.0, "epochs after which optim.freeze ends; 0 freezes for the whole run", least=0
    ),
    "optim.warmup_lr": Key(1e-6, "learning rate at the start; not scaled, as in the original"),
    "optim.min_lr": Key(1e-5, "learning rate at the end; not scaled"),
    "optim.warmup_epochs": Key(5.0, "epochs of linear warm-up"),
    "optim.b1": Key(0.9, "decay of the first moment per step"),
    "optim.b2": Key(0.999, "decay of the second moment per step"),
    "optim.eps": Key(1e-8, "number added to the square root of the second moment"),
    "optim.weight_decay": Key(
        0.05, "decay of matrices; biases, norms, gates and embeddings do not decay", least=0
    ),
    "optim.clip_norm": Key(
        0.0, "maximum global norm of the gradients; 0 is off, as in DeiT", least=0
    ),
    "optim.ema_decay": Key(
        0.0, "decay of the averaged weights per step; 0 is off; DeiT uses 0.99996",
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
    """Returns a configuration for data sets of 32 x 32 pixels, such as CIFAR.

    The settings are ours: the paper does not train on such images.

    Args:
      source: value of data.source.
      mean: mean of each channel, of values in [0, 1].
      std: standard deviation of each channel, of values in [0, 1].
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
        elif name == "model.image_size" and value is not None:
            try:
                image_size.parse(value, name)
            except ValueError as error:
                yield str(error)
        elif value is None and (reference[leaf] is None or KEYS[name].may_be_none):
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
    if not value <= key.most:
        yield f"{name}: expected at most {key.most:g}, got {value}"
