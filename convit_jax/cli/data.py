"""Checks the data of a configuration, or prepares ImageNet.

convit data check --config=configs/convit_b.py
convit data prepare --tars=DIR --data_dir=DIR"""

import argparse
from collections.abc import Sequence
import contextlib
import time
from typing import Any

import ml_collections
import numpy as np

from convit_jax.cli import options
from convit_jax.data.batches.chunks import Batch, EvalChunks, Share, TrainChunks, Transform
from convit_jax.data.batches.workers import iterate, num_workers
from convit_jax.data.corrupt import MEND, CorruptImageError
from convit_jax.data.first_names import first_names
from convit_jax.data.fit import settle_reading
from convit_jax.data.open import SPLITS
from convit_jax.data.pictures import contact_sheet
from convit_jax.data.source import Source, Subset, check_images, describe
from convit_jax.storage import as_path, is_bucket, whole_file
from convit_jax.train import init_from, setup

_NAMED = 50  # most classes that are all named
_DRAWN = 32  # training images of a contact sheet

_CHECK = """Shows the data set, decodes 32 images of each split, and times the input pipeline.

    convit data check --config=configs/convit_b.py --config.data.dir=DATA
    convit data check --config=finetune --config.data.source=folder:PATH --pictures=sheet.png

With --pictures, it also draws images with their labels, as the model will see them."""
_PREPARE = """Writes ImageNet from its two tar files in the layout of tensorflow-datasets.

    convit data prepare --tars=DIR --data_dir=DATA

DATA is a folder, which gets ArrayRecord files, or gs://BUCKET/NAME, which gets TFRecord files.
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
    check.add_argument(
        "--pictures",
        metavar="FILE",
        help="picture to write, such as sheet.png: 32 augmented training images and 16 test images",
    )
    prepare = commands.add_parser(
        "prepare", description=_PREPARE, help="write ImageNet from its tar files", **style
    )
    prepare.add_argument(
        "--tars", metavar="DIR", required=True, help="folder of the two tar files of ILSVRC2012"
    )
    prepare.add_argument(
        "--data_dir",
        metavar="DIR",
        required=True,
        help="folder to write the data set into, on a disk or in a bucket (gs://BUCKET/NAME)",
    )
    args, overrides = options.parse(parser, argv)
    options.start_logging()
    with options.report(ValueError, OSError):
        if args.command == "prepare":
            _prepare(args.tars, args.data_dir)
        elif args.config is None:
            check.error("--config: expected one")
        else:
            _check(options.configuration(args.config, overrides), args.pictures)


def _prepare(tars: str, data_dir: str) -> None:
    from convit_jax.data.imagenet import prepare

    path = prepare.prepare_imagenet(tars, data_dir)
    print(f"ready: {path}\nTrain with --config.data.dir={data_dir}")


def _check(config: ml_collections.ConfigDict, pictures: str | None) -> None:
    if pictures is not None and not is_bucket(pictures):  # a bucket has no empty folders
        folder = as_path(pictures).absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"--pictures: no such folder: {folder}")
    init_from.settle_new_model(config)
    model = setup.make_model(config)
    sources = {split: setup.open_split(config, split, None) for split in SPLITS}
    settle_reading(config, sources["train"])
    train_transform, eval_transform = setup.make_transforms(config, model)
    for split, source in sources.items():
        print(f"{split}: {describe(source)}")
        print(f"  classes {_listed(source.class_names)}")
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
    if pictures is not None:
        train = TrainChunks(
            sources["train"],
            train_transform,
            Share(_DRAWN),
            config.seed,
            config.data.repeats,
            config.data.skip_corrupt,
        )
        spread = np.linspace(0, len(sources["test"]) - 1, _DRAWN // 2).astype(int)
        some = Subset(sources["test"], np.unique(spread), "")
        test = EvalChunks(some, eval_transform, Share(len(some)), config.data.skip_corrupt)
        _draw(train[0], test[0], sources["train"].class_names, pictures)


def _listed(names: tuple[str, ...]) -> str:
    if len(names) <= _NAMED:
        return ", ".join(names)
    return first_names(names)


def _draw(train: Batch, test: Batch, class_names: tuple[str, ...], path: str) -> None:
    """Writes a contact sheet of training images and of test images that are not corrupt."""
    there = test["mask"] > 0
    rows = (
        (
            "training images, augmented; erasing and mixing come later",
            train["image"],
            train["label"],
        ),
        ("test images", test["image"][there], test["label"][there]),
    )
    sheet = contact_sheet(
        [(title, images, [class_names[i] for i in labels]) for title, images, labels in rows]
    )
    with whole_file(path, ValueError) as unfinished:  # raised by Pillow
        sheet.save(unfinished, format="PNG")
    print(f"wrote {path}")


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
