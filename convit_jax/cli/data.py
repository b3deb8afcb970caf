"""Checks the data of a configuration, or prepares ImageNet.

convit data check --config=configs/convit_b.py
convit data prepare --tars=DIR --data_dir=DIR"""

import argparse
from collections.abc import Sequence
import contextlib
import itertools
import time
from typing import Any

import ml_collections

from convit_jax.cli import options
from convit_jax.data.chunks import Share, TrainChunks, Transform
from convit_jax.data.corrupt import MEND, CorruptImageError
from convit_jax.data.source import Source, check_images, describe
from convit_jax.data.workers import iterate, num_workers
from convit_jax.train import setup

_CHECK = """Shows the data set, decodes 32 images of each split, and times the input pipeline.

    convit data check --config=configs/convit_b.py --config.data.dir=DATA"""
_PREPARE = """Writes ImageNet from its two tar files in the layout of tensorflow-datasets.

    convit data prepare --tars=DIR --data_dir=DATA

The tar files, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, come from image-net.org. They
are checked first. TensorFlow is not needed. After an interruption, the same command continues."""


def main(argv: Sequence[str] | None = None, prog: str = "convit data") -> None:
    """Parses the flags and runs `check` or `prepare`."""
    parser = options.make_parser(prog, __doc__ or "")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | prepare")
    style: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    check = commands.add_parser("check", description=_CHECK, help="check a data set", **style)
    options.add_config(check)
    prepare = commands.add_parser(
        "prepare", description=_PREPARE, help="write ImageNet from its tar files", **style
    )
    prepare.add_argument(
        "--tars", metavar="DIR", required=True, help="folder of the two tar files of ILSVRC2012"
    )
    prepare.add_argument(
        "--data_dir", metavar="DIR", required=True, help="folder to write the data set into"
    )
    args, overrides = options.parse(parser, argv)
    options.start_logging()
    with options.report(ValueError, OSError):
        if args.command == "prepare":
            _prepare(args.tars, args.data_dir)
        elif args.config is None:
            check.error("--config: expected one")
        else:
            _check(options.configuration(args.config, overrides))


def _prepare(tars: str, data_dir: str) -> None:
    from convit_jax.data import imagenet

    path = imagenet.prepare_imagenet(tars, data_dir)
    print(f"ready: {path}\nTrain with --config.data.dir={data_dir}")


def _check(config: ml_collections.ConfigDict) -> None:
    model = setup.make_model(config)
    train_transform, _ = setup.make_transforms(config, model)
    for split in ("train", "test"):
        source = setup.open_split(config, split, None)
        print(f"{split}: {describe(source)}")
        names = ", ".join(itertools.islice(source.class_names, 5))
        print(f"  classes {names}, ...")
        rate, damage = check_images(source, 32)
        if damage and not config.data.skip_corrupt:
            raise CorruptImageError(f"{damage[0]}. {MEND}")
        count = min(32, len(source))
        print(f"  {count} images decoded, {rate:.0f} a second on one core")
        if damage:
            print(f"  {len(damage)} of them are corrupt and would be skipped:")
            print("\n".join(f"    {text}" for text in damage))
        if split == "train":
            _time(config, source, train_transform)


def _time(config: ml_collections.ConfigDict, source: Source, transform: Transform) -> None:
    """Prints the speed of the input pipeline with the configured number of workers."""
    workers = num_workers(config.data.workers, source)
    chunks = TrainChunks(
        source, transform, Share(64), config.seed, skip_corrupt=config.data.skip_corrupt
    )
    steps = 1 + 8 * max(workers, 1)
    with contextlib.closing(iterate(chunks, stop_step=steps, workers=workers)) as batches:
        next(batches)  # starts the workers, which is not timed
        start = time.perf_counter()
        count = sum(len(batch["label"]) for batch in batches)
        rate = count / (time.perf_counter() - start)
    print(f"  training images: {rate:.0f} a second with {workers} worker processes")
