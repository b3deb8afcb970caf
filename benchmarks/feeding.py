"""Measures how fast worker processes make batches, and how long training waits for them.

    python -m benchmarks.feeding workers
    python -m benchmarks.feeding training
    python -m benchmarks.feeding bucket

"workers" times the whole input pipeline, from JPEG bytes to batches in this process, alternately
with one and with two worker processes. "training" trains convit_tiny on the machine's devices from
a folder of JPEGs and prints the share of the time that is spent waiting for a batch. Both use the
photos of benchmarks.input_pipeline: 500 x 375 pixels, quality 90.

"bucket" does both with photos of 110 kB that lie in a bucket, which benchmarks.slow_bucket serves
on this machine and whose answers come after 30 ms. It times reading them one after another, reading
them ahead as a worker does, and one worker process with the bucket and with the disk.
"""

import argparse
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import input_pipeline
from configs import convit_ti
from convit_jax.data.batches.chunks import TrainChunks, draws_per_epoch
from convit_jax.data.batches.workers import iterate
from convit_jax.train import loop, setup
from convit_jax.workdir.folder import Workdir

# Enough images that an epoch is longer than a measurement.
IMAGES = 20_000
DELAY = 0.03  # seconds until the bucket answers


def write_folder(root: pathlib.Path, images: int, **photo_options) -> None:
    """Writes a folder of two classes in train/ and val/; the files are hard links to the photos."""
    root.mkdir(parents=True)
    photos = []
    for number, photo in enumerate(input_pipeline.photos(**photo_options)):
        photos.append(root / f"{number}.jpg")
        photos[-1].write_bytes(photo)
    for split in ("train", "val"):
        for number in range(images if split == "train" else 2):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(photos[number % len(photos)], folder / f"{number:05}.jpg")


def make_config(images: str | pathlib.Path, batch_size: int, steps: int, workers: int):
    config = convit_ti.get_config()
    config.data.update(source=f"folder:{images}", workers=workers)
    config.train.update(batch_size=batch_size, log_every=2, eval_every=1e9)
    draws = draws_per_epoch(IMAGES, config.data.repeats)
    config.train.epochs = (steps + 0.5) * batch_size / draws
    return config


def time_workers(root: pathlib.Path, repetitions: int) -> None:
    """Prints images/s with one and two workers, once both have started, and their ratio."""
    run = setup.prepare(make_config(root / "images", 64, 1, 0), Workdir(root / "run"))
    rates = {1: [], 2: []}
    for _ in range(repetitions):
        for workers, found in rates.items():
            found.append(images_per_second(run.train_chunks, workers, 80))
    ratio = np.percentile(np.divide(rates[2], rates[1]), [25, 50, 75])
    for workers, found in rates.items():
        print(f"{workers} worker processes: {np.median(found):.0f} images/s")
    print(f"ratio {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})")


def images_per_second(chunks: TrainChunks, workers: int, count: int) -> float:
    """Returns the images/s of `count` batches."""
    # Training chunks are endless, so neither the start nor the stop of workers is timed.
    batches = iterate(chunks, workers=workers)
    with contextlib.closing(batches):
        for _ in range(8):  # warms up and uses the batches that were made ahead
            next(batches)
        start = time.perf_counter()
        images = sum(len(next(batches)["label"]) for _ in range(count))
        return images / (time.perf_counter() - start)


@contextlib.contextmanager
def slow_bucket(root: pathlib.Path) -> Iterator[str]:
    """Serves a folder as a bucket, to this process and its workers; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "FSSPEC_GCS_TOKEN": "anon",
    }
    command = [sys.executable, "-m", "benchmarks.slow_bucket", str(root)]
    server = subprocess.Popen([*command, f"--port={port}", f"--delay={DELAY}"])
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield "gs://bucket"
    finally:
        server.kill()
        server.wait()


def time_bucket(root: pathlib.Path, url: str, repetitions: int) -> None:
    """Prints images/s from a bucket, read alone and made into batches, and from the disk."""
    places = {"bucket": f"{url}/images", "disk": root / "images"}
    runs = {
        place: setup.prepare(make_config(images, 64, 1, 0), Workdir(root / f"run-{place}"))
        for place, images in places.items()
    }
    names = ("read one after another", "read ahead", *places)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        source = runs["bucket"].train_chunks.source
        start = time.perf_counter()
        size = np.mean([len(source[64 * repetition + i]["image"]) for i in range(64)])
        rates["read one after another"].append(64 / (time.perf_counter() - start))
        start = time.perf_counter()
        source.request(range(128))
        for index in range(1024):
            source.request(range(index + 128, index + 129))
            source[index]
        rates["read ahead"].append(1024 / (time.perf_counter() - start))
        for place, run in runs.items():
            rates[place].append(images_per_second(run.train_chunks, 1, 24))
    print(f"{size / 1e3:.0f} kB an image, answers after {DELAY * 1e3:.0f} ms")
    base = np.array(rates["read one after another"])
    for name, found in rates.items():
        low, median, high = np.percentile(np.array(found) / base, [25, 50, 75])
        print(
            f"{name + (', one worker' if name in runs else ''):<24}{np.median(found):6.0f} "
            f"images/s, {median:.1f} ({low:.1f} to {high:.1f}) times"
        )


def time_training(
    images: str | pathlib.Path, root: pathlib.Path, batch_size: int, steps: int, workers: int
) -> None:
    """Prints the images/s of training and the share of the time spent waiting for batches."""
    workdir = Workdir(root / "run")
    run = setup.prepare(make_config(images, batch_size, steps, workers), workdir)
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
    parser.add_argument("what", choices=("workers", "training", "bucket"))
    parser.add_argument("--repetitions", type=int, default=5, help="measurements (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help='for "training" (default: 32)')
    parser.add_argument("--steps", type=int, default=24, help='for "training" (default: 24)')
    parser.add_argument("--workers", type=int, default=2, help='for "training" (default: 2)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        options = {"size": (515, 386), "quality": 98} if args.what == "bucket" else {}
        write_folder(root / "images", IMAGES, **options)
        if args.what == "workers":
            time_workers(root, args.repetitions)
        elif args.what == "training":
            time_training(root / "images", root, args.batch, args.steps, args.workers)
        else:
            with slow_bucket(root) as url:
                time_bucket(root, url, args.repetitions)
                time_training(f"{url}/images", root, args.batch, args.steps, args.workers)


if __name__ == "__main__":
    main()
