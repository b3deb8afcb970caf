"""The recipe: every configuration key, once, with its unit and its source.

DeiT's recipe (Touvron et al. 2021, arXiv:2012.12877, Table 9), which the ConViT paper keeps
unchanged for Ti, S and B. The other files of this folder say what differs for one model or data
set. Any key can be set on the command line: `--config.train.batch_size=256`.
"""

from collections.abc import Iterator
import difflib

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the initialisation, the order of the data, augmentation and dropout

    # Folder of compiled programs, which make a restart quick; "workdir": in it; "": none.
    config.compilation_cache = "workdir"

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.fsdp = 1  # devices over which parameters and optimiser state are split; 1: none

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 1000  # steps; besides, every evaluation and every interruption
    checkpoint.keep = 2  # newest; the best by top-1 stays too

    config.init_from = ""  # weights to start from, all that convit_jax.load reads; "": random
    config.init_ema = False  # with init_from: its averaged weights
    config.init_new_head = False  # with init_from: start the head anew, for other classes
    config.init_resize_pos_embed = False  # with init_from: interpolate it to another image size
    config.init_adapt_channels = False  # with init_from: sum or repeat RGB for other in_channels

    config.model = model = ml_collections.ConfigDict()
    model.name = "convit_base"  # one of convit_jax.VARIANTS
    model.num_classes = config_dict.placeholder(int)  # None: the data's
    # Pixels: the side of a square, or (height, width): --config.model.image_size=224,320
    model.image_size = config_dict.FieldReference(224, field_type=object)
    model.drop_path = 0.1  # rate of the last block, growing linearly from 0
    model.dropout = 0.0
    model.attn_dropout = 0.0
    # The other options of convit_jax.ConViT. None: what the model's name stands for.
    model.in_channels = config_dict.placeholder(int)
    model.patch_size = config_dict.placeholder(int)  # pixels
    model.embed_dim = config_dict.placeholder(int)
    model.depth = config_dict.placeholder(int)  # blocks
    model.num_heads = config_dict.placeholder(int)
    model.mlp_ratio = config_dict.placeholder(float)
    model.qkv_bias = config_dict.placeholder(bool)
    model.qk_scale = config_dict.placeholder(float)
    model.local_up_to_layer = config_dict.placeholder(int)  # number of GPSA blocks
    model.locality_strength = config_dict.placeholder(float)  # the paper's alpha
    model.use_local_init = config_dict.placeholder(bool)
    model.use_pos_embed = config_dict.placeholder(bool)
    model.cls_pos_embed = config_dict.placeholder(bool)
    model.global_pool = config_dict.placeholder(str)  # token, avg
    model.attention = config_dict.placeholder(str)  # auto, xla, chunked, cudnn
    model.positional = config_dict.placeholder(str)  # auto, blend, contract
    model.unroll = config_dict.placeholder(int)  # layers in one iteration of the scan

    config.data = data = ml_collections.ConfigDict()
    data.source = "tfds:imagenet2012"  # tfds:NAME, folder:PATH, digits
    data.dir = ""  # where tfds data sets are; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data.val_fraction = 0.1  # of a folder without a validation part: held out of each class
    data.sampling_ratio = 1.0  # share of each class to train on (the paper's Table 2)
    data.epochs_scale = 1.0  # times train.epochs; 1 / sampling_ratio keeps the images seen
    data.repeats = 3  # draws of an image in a row, repeated augmentation; 1 is off
    data.skip_corrupt = False  # train on other images in place of corrupt ones, and count them
    data.workers = config_dict.placeholder(int)  # processes; None: one a core, digits none
    data.mean = (0.485, 0.456, 0.406)  # per channel, of values in [0, 1]
    data.std = (0.229, 0.224, 0.225)

    config.augment = augment = ml_collections.ConfigDict()  # on the host, see convit_jax.augment
    augment.crop = "random_resized"  # random_resized, pad, none
    augment.scale = (0.08, 1.0)  # share of the image's area
    augment.ratio = (3 / 4, 4 / 3)  # width over height
    augment.pad_crop = 0  # pixels on every side, with crop = pad
    augment.flip = 0.5  # probability
    augment.randaugment_ops = 2  # operations an image; 0 is off
    augment.randaugment_magnitude = 9.0  # of 10
    augment.randaugment_std = 0.5  # of the magnitude
    augment.color_jitter = 0.4  # used when RandAugment is off
    augment.eval_crop = 0.875  # of the resized image, in evaluation
    augment.backend = "fast"  # fast, exact (Pillow, timm's pixels)

    config.mixup = mixup = ml_collections.ConfigDict()  # on the device, see convit_jax.mixup
    mixup.mixup = 0.8  # alpha of Beta(alpha, alpha); 0 is off
    mixup.cutmix = 1.0  # likewise
    mixup.prob = 1.0
    mixup.switch_prob = 0.5  # of CutMix, where both are on
    mixup.group_size = 128  # images that share a lambda: DeiT's batch on one GPU
    mixup.erase_prob = 0.25
    mixup.erase_mode = "pixel"  # pixel, const, rand

    config.train = train = ml_collections.ConfigDict()
    train.epochs = 300.0
    train.batch_size = 1024  # images over all devices
    train.accum_steps = 1  # parts of a batch computed in turn, one update: less memory
    train.label_smoothing = 0.1
    train.dtype = "auto"  # of matrix products: float32, bfloat16; auto: bfloat16 on GPU and TPU
    train.remat = "dots"  # computed again in the backward pass: none, dots, block (least memory)
    train.log_every = 50  # steps
    train.eval_every = 1.0  # epochs; the last step is always evaluated

    config.optim = optim = ml_collections.ConfigDict()  # AdamW
    optim.lr = 5e-4  # for 512 images; scaled by batch_size / 512
    optim.warmup_lr = 1e-6  # not scaled, as in the original
    optim.min_lr = 1e-5  # not scaled
    optim.warmup_epochs = 5.0
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.05  # of matrices; biases, norms, gates and embeddings have none
    optim.clip_norm = 0.0  # largest norm of all gradients together; 0 is off, as in DeiT
    optim.ema_decay = 0.0  # of the averaged weights, for each step; 0 is off; DeiT's is 0.99996
    return config


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError naming every key that is unknown, missing or of the wrong type."""
    problems = list(_problems(config, get_config(), ""))
    if problems:
        raise ValueError(
            "the configuration does not fit configs/common.py:\n  " + "\n  ".join(problems)
        )


def _problems(
    config: ml_collections.ConfigDict, reference: ml_collections.ConfigDict, path: str
) -> Iterator[str]:
    found, known = set(config.keys()), set(reference.keys())
    for key in sorted(found - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {path}{close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        yield f"unknown key: {path}{key} ({hint})"
    for key in sorted(known - found):
        yield f"missing key: {path}{key}"
    for key in sorted(known & found):
        value, expected = config[key], reference.get_type(key)
        if f"{path}{key}" == "model.image_size":
            if not _is_image_size(value):
                yield (
                    f"{path}{key}: expected the side of a square or (height, width), each a whole "
                    f"number of pixels, got {value!r}"
                )
        elif expected is ml_collections.ConfigDict and isinstance(value, expected):
            yield from _problems(value, reference[key], f"{path}{key}.")
        elif value is None and reference[key] is None:
            pass  # a placeholder that was left alone
        elif type(value) is not expected and (type(value), expected) != (int, float):
            yield f"{path}{key}: expected {expected.__name__}, got {value!r}"


def _is_image_size(value: object) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(type(side) is int and side > 0 for side in sides)
