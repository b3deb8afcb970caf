"""Converts weights between PyTorch, this project and StableHLO.

    convit convert convit_base.pth convit_base.safetensors
    convit convert runs/mine mine.pth --to torch
    convit convert convit_base convit_base.stablehlo --uint8
    convit convert runs/mine hub:ORGANISATION/NAME

SRC is any source that convit_jax.load reads: a file of safetensors or PyTorch, the workdir of a
run, either of them in a bucket (gs://, s3://), or a name on huggingface.co. DST may be in a bucket
too. The suffix of DST decides the format; .pth and .pt need torch.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import logging
import pathlib
import time

from convit_jax.cli import options
from convit_jax.data import class_names
from convit_jax.model.variants import VARIANTS, options_of_kind
from convit_jax.storage import as_path, is_bucket, size, whole_file
from convit_jax.weights import hub, publish, safetensors, torch_pickle
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.state_dict import to_torch

log = logging.getLogger(__name__)

_FORMATS = {
    ".safetensors": ("flax", "torch"),  # one file serves both
    ".pth": ("torch",),
    ".pt": ("torch",),
    ".stablehlo": ("flax",),
}


def main(argv: Sequence[str] | None = None, prog: str = "convit convert") -> None:
    """Parses the flags and converts. A user's error ends the process with a message."""
    parser = _parser(prog)
    args, rest = parser.parse_known_args(argv)
    if rest:
        hint = "; --image_size takes one size: 224, or 224x320" if args.image_size else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    options.start_logging()
    with options.report(ValueError, OSError):
        convert(args)


def convert(args: argparse.Namespace) -> None:
    """Reads SRC and writes DST, as the flags say.

    Args:
      args: the parsed flags.

    Raises:
      ValueError: if SRC holds no weights of a ConViT or DeiT, or the flags do not fit it.
      OSError: if SRC cannot be read or DST cannot be written. DST is then left as it was.
    """
    start = time.perf_counter()
    repository = hub.destination(args.dst)
    path = pathlib.Path(args.dst) if repository else as_path(args.dst)
    if repository is None:
        _check_file(path, args)
    else:
        _check_repository(args)
    overrides = {
        key: getattr(args, key)
        for key in (*options_of_kind("changeable"), "num_heads")
        if getattr(args, key) is not None
    }
    loaded = read_weights(args.src, args.variant, ema=args.ema, offline=args.offline, **overrides)
    if repository is not None:
        url = publish.push(repository, loaded, private=args.private)
        log.info("wrote %s, in %.1f s", url, time.perf_counter() - start)
        return
    if path.suffix == ".safetensors":
        safetensors.save_weights(path, loaded)
    elif path.suffix == ".stablehlo":
        _export(path, loaded, args)
    else:
        state_dict = to_torch(loaded.params)
        with whole_file(path, RuntimeError) as unfinished:  # raised by torch
            torch_pickle.write(unfinished, state_dict)
    megabytes = size(path) / 1e6
    log.info("wrote %s, %.1f MB, in %.1f s", path, megabytes, time.perf_counter() - start)


def _export(path: pathlib.Path, loaded: Loaded, args: argparse.Namespace) -> None:
    from convit_jax.weights import stablehlo

    model = loaded.model
    if loaded.class_names is None and model.num_classes == len(class_names.imagenet()):
        names = class_names.readable(None, model.num_classes)
        loaded = dataclasses.replace(loaded, class_names=names)
        log.info("%s: the weights name no classes; 1,000 are taken for ImageNet's", path)
    stablehlo.save_exported(path, loaded, args.batch, uint8=args.uint8)
    shape = (args.batch or "any number", *model.image_shape)
    if args.uint8:
        log.info("the exported model takes uint8 images %s and normalises them", shape)
    else:
        log.info(
            "the exported model takes float32 images %s, normalised by mean %s and std %s",
            shape, loaded.mean, loaded.std,
        )  # fmt: skip


def _check_repository(args: argparse.Namespace) -> None:
    if args.batch is not None or args.uint8:
        raise ValueError("--batch and --uint8: expected with a DST of .stablehlo, and no other")
    publish.check_token()


def _check_file(path: pathlib.Path, args: argparse.Namespace) -> None:
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"DST: expected one of {', '.join(_FORMATS)}, or hub:ORGANISATION/NAME, got {path}"
        )
    if args.to and args.to not in _FORMATS[path.suffix]:
        raise ValueError(
            f"--to: expected {' or '.join(_FORMATS[path.suffix])} for {path.suffix}, got {args.to}"
        )
    for flag in ("batch", "uint8"):
        if path.suffix != ".stablehlo" and getattr(args, flag):
            raise ValueError(f"--{flag}: expected with a DST of .stablehlo, and with no other")
    if args.private:
        raise ValueError(f"--private: expected with a DST of hub:ORGANISATION/NAME, got {path}")
    if not is_bucket(path) and not path.parent.is_dir():  # a bucket has no empty folders
        raise FileNotFoundError(f"DST: no such folder: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"DST: is a folder: {path}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(prog, __doc__ or "")
    add = parser.add_argument
    add("src", metavar="SRC", help="weights to read")
    add(
        "dst",
        metavar="DST",
        help="file or repository to write: .safetensors, with PyTorch's names, and with the "
        "model's options, classes and normalisation in the metadata; .pth or .pt, a state dict of "
        "PyTorch for timm and the original code; .stablehlo, inference that needs only jax; "
        "hub:ORGANISATION/NAME, a repository on huggingface.co that timm and this project read",
    )
    add("--to", choices=("flax", "torch"), help="framework of DST; checked against its suffix")
    add(
        "--variant",
        choices=VARIANTS,
        metavar="NAME",
        help=f"name of the model, checked against the weights: {', '.join(VARIANTS)}",
    )
    add("--ema", action="store_true", help="use the averaged weights of a checkpoint or run")
    add("--offline", action="store_true", help="look for names in the local cache only")
    add(
        "--num_classes",
        type=options.not_negative,
        metavar="N",
        help="number of classes; another number than that of the weights makes a new head, and 0 "
        "drops the head",
    )
    add(
        "--image_size",
        type=options.size,
        metavar="PIXELS",
        help="new image size in pixels, 384 or 224x320 (height x width); interpolates the position "
        "embedding",
    )
    add(
        "--in_channels",
        type=options.positive,
        metavar="N",
        help="number of input channels; the first convolution is adapted to it as timm does",
    )
    add(
        "--num_heads",
        type=options.positive,
        metavar="N",
        help="heads of a DeiT whose width is not the paper's",
    )
    add(
        "--batch",
        type=options.positive,
        metavar="N",
        help="number of images in every call of a .stablehlo; without it any number",
    )
    add(
        "--uint8",
        action="store_true",
        help="a .stablehlo that takes uint8 pixels and normalises them; without it, it takes "
        "normalised float32 images",
    )
    add(
        "--private",
        action="store_true",
        help="make a new repository on huggingface.co private; one that exists stays as it is",
    )
    return parser
