"""Converts weights between PyTorch, this project and StableHLO.

    convit convert convit_base.pth convit_base.safetensors
    convit convert runs/mine mine.pth --to torch
    convit convert convit_base convit_base.stablehlo --batch 8

SRC is whatever convit_jax.load reads: .pth, .pt and .bin files (they need torch), .safetensors, the
workdir of a run, or a name on huggingface.co. The suffix of DST says what is written.
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
    """Parses the command line and converts; mistakes end it with a message."""
    args = _parser(prog).parse_args(argv)
    options.start_logging()
    with options.report(ValueError, OSError):
        convert(args)


def convert(args: argparse.Namespace) -> None:
    """Does what the command line says.

    Raises:
      ValueError: if the source or the options are not what they should be.
      OSError: if something cannot be found or written; then nothing is left at the destination.
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
            "it takes float32 images %s, normalised by mean %s and std %s",
            (args.batch, *loaded.model.image_shape), loaded.mean, loaded.std,
        )  # fmt: skip
    else:
        state_dict = to_torch(loaded.params)
        with whole_file(path, RuntimeError) as unfinished:  # torch's
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
    add("src", metavar="SRC", help="weights")
    add(
        "dst",
        metavar="DST",
        help=".safetensors: our export, with the model's options, classes and normalisation in its "
        "metadata, under PyTorch's names; .pth or .pt: torch.save of a state dict for timm and "
        "upstream; .stablehlo: inference, to be called without this project",
    )
    add("--to", choices=("flax", "torch"), help="whom DST is for; checked against its suffix")
    add(
        "--variant",
        metavar="NAME",
        help=f"the model, checked against what the weights tell: {', '.join(VARIANTS)}",
    )
    add("--ema", action="store_true", help="take the averaged weights of a checkpoint or run")
    add("--offline", action="store_true", help="look for names in the local cache only")
    add("--num_classes", type=int, metavar="N", help="another number makes a new head; 0: none")
    add(
        "--image_size",
        type=options.size,
        metavar="PIXELS",
        help="image size, 384 or 224x320 (height x width); interpolates the position embedding",
    )
    add("--in_channels", type=int, metavar="N", help="adapts the first convolution, as timm does")
    add("--num_heads", type=int, metavar="N", help="of a DeiT of another width than the paper's")
    add("--batch", type=int, metavar="N", help="images of a call, with .stablehlo")
    return parser
