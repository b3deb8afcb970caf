"""Converts weights between PyTorch, this project and StableHLO.

    convit convert convit_base.pth convit_base.safetensors
    convit convert runs/mine mine.pth --to torch
    convit convert convit_base convit_base.stablehlo --batch 8

SRC is any source that convit_jax.load reads: a file of safetensors or PyTorch, the workdir of a
run, or a name on huggingface.co. The suffix of DST decides the format; .pth and .pt need torch.
"""

import argparse
from collections.abc import Sequence
import logging
import pathlib
import time

from convit_jax.cli import options
from convit_jax.model.variants import VARIANTS, options_of_kind
from convit_jax.storage import whole_file
from convit_jax.weights import safetensors, torch_pickle
from convit_jax.weights.load import read_weights
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
    args = _parser(prog).parse_args(argv)
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
    path = pathlib.Path(args.dst)
    _check_destination(path, args)
    overrides = {
        key: getattr(args, key)
        for key in (*options_of_kind("changeable"), "num_heads")
        if getattr(args, key) is not None
    }
    loaded = read_weights(args.src, args.variant, ema=args.ema, offline=args.offline, **overrides)
    if path.suffix == ".safetensors":
        safetensors.save_weights(path, loaded)
    elif path.suffix == ".stablehlo":
        from convit_jax.weights import stablehlo

        stablehlo.save_exported(path, loaded, args.batch)
        log.info(
            "the exported model takes float32 images %s, normalised by mean %s and std %s",
            (args.batch, *loaded.model.image_shape), loaded.mean, loaded.std,
        )  # fmt: skip
    else:
        state_dict = to_torch(loaded.params)
        with whole_file(path, RuntimeError) as unfinished:  # raised by torch
            torch_pickle.write(unfinished, state_dict)
    megabytes = path.stat().st_size / 1e6
    log.info("wrote %s, %.1f MB, in %.1f s", path, megabytes, time.perf_counter() - start)


def _check_destination(path: pathlib.Path, args: argparse.Namespace) -> None:
    if path.suffix not in _FORMATS:
        raise ValueError(f"DST: expected one of {', '.join(_FORMATS)}, got {path}")
    if args.to and args.to not in _FORMATS[path.suffix]:
        raise ValueError(
            f"--to: expected {' or '.join(_FORMATS[path.suffix])} for {path.suffix}, got {args.to}"
        )
    if (path.suffix == ".stablehlo") != (args.batch is not None):
        raise ValueError("--batch: expected with a DST of .stablehlo, and with no other")
    if not path.parent.is_dir():
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
        help="file to write: .safetensors, with PyTorch's names, and with the model's options, "
        "classes and normalisation in the metadata; .pth or .pt, a state dict of PyTorch for timm "
        "and the original code; .stablehlo, inference that needs only jax",
    )
    add("--to", choices=("flax", "torch"), help="framework of DST; checked against its suffix")
    add(
        "--variant",
        metavar="NAME",
        help=f"name of the model, checked against the weights: {', '.join(VARIANTS)}",
    )
    add("--ema", action="store_true", help="use the averaged weights of a checkpoint or run")
    add("--offline", action="store_true", help="look for names in the local cache only")
    add(
        "--num_classes",
        type=int,
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
        type=int,
        metavar="N",
        help="number of input channels; the first convolution is adapted to it as timm does",
    )
    add("--num_heads", type=int, metavar="N", help="heads of a DeiT whose width is not the paper's")
    add("--batch", type=int, metavar="N", help="number of images per call; required for .stablehlo")
    return parser
