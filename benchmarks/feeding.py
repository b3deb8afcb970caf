"""Measures how fast worker processes make batches, and how long training waits for them.

    python -m benchmarks.feeding workers
    python -m benchmarks.feeding training

"workers" times the whole input pipeline, from JPEG bytes to batches in this process, alternately
with one and with two worker processes. "training" trains convit_tiny on the machine's devices from
a folder of JPEGs and prints the share of the time that is spent waiting for a batch. Both use the
photos of benchmarks.input_pipeline: 500 x 375 pixels, quality 90.
"""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from benchmarks import input_pipeline
from configs import convit_ti
from convit_jax.data.batches.chunks import draws_per_epoch
from convit_jax.data.batches.workers import iterate
from convit_jax.train import loop, setup
from convit_jax.workdir.folder import Workdir

# Enough images that an epoch is longer than a measurement.
IMAGES = 20_000


def write_folder(root: pathlib.Path, images: int) -> None:
    """Writes a folder of two classes in train/ and val/; the files are hard links to the photos."""
    root.mkdir(parents=True)
    photos = []
    for number, photo in enumerate(input_pipeline.photos()):
        photos.append(root / f"{number}.jpg")
        photos[-1].write_bytes(photo)
    for split in ("train", "val"):
        for number in range(images if split == "train" else 2):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(photos[number % len(photos)], folder / f"{number:05}.jpg")


def make_config(root: pathlib.Path, batch_size: int, steps: int, workers: int):
    config = convit_ti.get_config()
    config.data.update(source=f"folder:{root / 'images'}", workers=workers)
    config.train.update(batch_size=batch_size, log_every=2, eval_every=1e9)
    draws = draws_per_epoch(IMAGES, config.data.repeats)
    config.train.epochs = (steps + 0.5) * batch_size / draws
    return config


def time_workers(root: pathlib.Path, repetitions: int) -> None:
    """Prints images/s with one and two workers, once both have started, and their ratio."""
    run = setup.prepare(make_config(root, 64, 1, 0), Workdir(root / "run"))
    rates = {1: [], 2: []}
    for _ in range(repetitions):
        for workers, found in rates.items():
            # Training chunks are endless, so neither the start nor the stop of workers is timed.
            batches = iterate(run.train_chunks, workers=workers)
            with contextlib.closing(batches):
                for _ in range(16):  # warms up and uses the batches that were made ahead
                    next(batches)
                start = time.perf_counter()
                images = sum(len(next(batches)["label"]) for _ in range(80))
                found.append(images / (time.perf_counter() - start))
    ratio = np.percentile(np.divide(rates[2], rates[1]), [25, 50, 75])
    for workers, found in rates.items():
        print(f"{workers} worker processes: {np.median(found):.0f} images/s")
    print(f"ratio {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})")


def time_training(root: pathlib.Path, batch_size: int, steps: int, workers: int) -> None:
    """Prints the images/s of training and the share of the time spent waiting for batches."""
    run = setup.prepare(make_config(root, batch_size, steps, workers), Workdir(root / "run"))
    loop.train(run)
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"][2:]  # leaves out the start
    seconds = [2 * batch_size / line["images_per_second"] for line in lines]
    share = sum(line["data_seconds"] for line in lines) / sum(seconds)
    rate = 2 * batch_size * len(lines) / sum(seconds)
    print(f"{rate:.1f} images/s, {share:.2%} of the time waiting for data")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("workers", "training"))
    parser.add_argument("--repetitions", type=int, default=5, help='for "workers" (default: 5)')
    parser.add_argument("--batch", type=int, default=32, help='for "training" (default: 32)')
    parser.add_argument("--steps", type=int, default=24, help='for "training" (default: 24)')
    parser.add_argument("--workers", type=int, default=2, help='for "training" (default: 2)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_folder(root / "images", IMAGES)
        if args.what == "workers":
            time_workers(root, args.repetitions)
        else:
            time_training(root, args.batch, args.steps, args.workers)


if __name__ == "__main__":
    main()
