"""Looks at the data of a configuration, or prepares ImageNet.

    python -m convit_jax.data check --config=configs/convit_b.py
    python -m convit_jax.data prepare --tars=DIR --data_dir=DIR

check says what is found where, decodes 32 images of each split and times the input pipeline.
prepare writes ImageNet from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which --tars
holds, into tfds' layout; it needs no TensorFlow and goes on where it was stopped.
"""

import contextlib
import itertools
import time

from absl import app, flags

from convit_jax import cli, data, sources

_TARS = flags.DEFINE_string("tars", None, "prepare: folder with the two tars of ILSVRC2012.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "prepare: folder for the data set.")


def main(rest: list[str]) -> None:
    commands = {"check": _check, "prepare": _prepare}
    if len(rest) != 1 or rest[0] not in commands:
        raise app.UsageError(f"expected check or prepare, got {' '.join(rest) or 'nothing'}")
    with cli.report(ValueError, OSError):
        commands[rest[0]]()


def _prepare() -> None:
    if not _TARS.value or not _DATA_DIR.value:
        raise app.UsageError("prepare: expected --tars and --data_dir")
    from convit_jax import prepare

    path = prepare.prepare_imagenet(_TARS.value, _DATA_DIR.value)
    print(f"ready: {path}\nTrain with --config.data.dir={_DATA_DIR.value}")


def _check() -> None:
    if cli.CONFIG.value is None:
        raise app.UsageError("check: expected --config")
    from configs import common
    from convit_jax import startup

    config = cli.CONFIG.value
    common.check(config)
    model = startup.make_model(config)
    train_transform, _ = startup.make_transforms(config, model)
    for split in ("train", "test"):
        source = startup.open_source(config, split, cache_dir=None)
        print(f"{split}: {sources.describe(source)}")
        names = ", ".join(itertools.islice(source.class_names, 5))
        print(f"  classes {names}, ...")
        rate = sources.check_images(source, 32)
        print(f"  {min(32, len(source))} images decoded, {rate:.0f} a second on one core")
        if split == "train":
            _time(config, source, train_transform)


def _time(config, source: sources.Source, transform: data.Transform) -> None:
    """Prints what the pipeline delivers here, with the workers of the configuration."""
    workers = data.num_workers(config.data.workers, source)
    chunks = data.TrainChunks(
        source, transform, data.Share(64), config.seed, skip_corrupt=config.data.skip_corrupt
    )
    steps = 1 + 8 * max(workers, 1)
    with contextlib.closing(data.iterate(chunks, stop_step=steps, workers=workers)) as batches:
        next(batches)  # starts the workers
        start = time.perf_counter()
        count = sum(len(batch["label"]) for batch in batches)
        rate = count / (time.perf_counter() - start)
    print(f"  training images: {rate:.0f} a second with {workers} worker processes")
