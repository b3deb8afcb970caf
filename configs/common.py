"""The recipe: every configuration key, once, with its unit and its source.

DeiT's recipe (Touvron et al. 2021, arXiv:2012.12877, Table 9), which the ConViT paper keeps
unchanged (section 4). The other files of this folder say what differs for one model or data set.
Any key can be set on the command line: `--config.train.batch_size=256`.
"""

from collections.abc import Iterator
import difflib

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the initialisation, the order of the data, augmentation and dropout

    config.model = model = ml_collections.ConfigDict()
    model.name = "convit_base"  # one of convit_jax.VARIANTS
    model.num_classes = 1000
    model.image_size = 224  # pixels
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
    model.positional = config_dict.placeholder(str)  # blend, contract
    model.unroll = config_dict.placeholder(int)  # layers in one iteration of the scan

    config.data = data = ml_collections.ConfigDict()
    data.source = "tfds:imagenet2012"
    data.mean = (0.485, 0.456, 0.406)  # per channel, of values in [0, 1]
    data.std = (0.229, 0.224, 0.225)
    data.pad_crop = 0  # pixels added on every side before a random crop of the old size; 0 is off

    config.train = train = ml_collections.ConfigDict()
    train.epochs = 300.0
    train.batch_size = 1024  # images over all devices
    train.label_smoothing = 0.1
    train.dtype = "auto"  # of matrix products: float32, bfloat16; auto: bfloat16 on GPU and TPU
    train.remat = False  # compute blocks again in the backward pass: less memory, more time
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
        if expected is ml_collections.ConfigDict and isinstance(value, expected):
            yield from _problems(value, reference[key], f"{path}{key}.")
        elif value is None and reference[key] is None:
            pass  # a placeholder that was left alone
        elif type(value) is not expected and (type(value), expected) != (int, float):
            yield f"{path}{key}: expected {expected.__name__}, got {value!r}"
