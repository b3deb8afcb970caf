"""Compares the speed of our host transforms with timm's: JPEG bytes in, pixels out.

    python -m benchmarks.input_pipeline --repetitions 30

The images are five photos of scikit-learn and scikit-image, as JPEGs of 500 x 375 pixels at quality
90. Everything runs in one process and one thread, without worker processes. "timm" is timm's whole
transform, to a normalised (and, in training, erased) float tensor. "timm, uint8" stops at bytes,
which timm does if its prefetcher does the rest on the GPU. Ours returns uint8: the device
normalises and erases in the training step.

The speed of a machine drifts. So each repetition times every contender once, and ratios are taken
within a repetition.
"""

import argparse
from collections.abc import Callable
import io
import os
import random
import time

import numpy as np
from PIL import Image
import PIL.features

from benchmarks import peer
from convit_jax.data.images.transforms import EvalTransform, TrainTransform

Run = Callable[[bytes], object]


def photos(size: tuple[int, int] = (500, 375), quality: int = 90) -> list[bytes]:
    """Returns JPEG files of (width, height) `size`: photos of scikit-learn and scikit-image."""
    import skimage.data
    from sklearn import datasets

    images = datasets.load_sample_images().images
    images += [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    files = []
    for image in images:
        file = io.BytesIO()
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        picture.save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def contenders() -> dict[str, dict[str, Run]]:
    """Returns {"training" or "evaluation": {contender: function of the bytes of an image}}."""
    _, torch = peer.import_timm()
    from timm.data import create_transform

    torch.set_num_threads(1)

    def theirs(**options) -> Run:
        transform = create_transform(224, interpolation="bicubic", **options)
        return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours(backend: str) -> Run:
        transform, rng = TrainTransform(224, backend=backend), np.random.default_rng(0)
        return lambda data: transform(data, rng)

    recipe = {
        "is_training": True,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
    }
    return {
        "training": {
            "timm": theirs(**recipe),
            "timm, uint8": theirs(**recipe, use_prefetcher=True),
            "ours, fast": ours("fast"),
            "ours, exact": ours("exact"),
        },
        "evaluation": {
            "timm": theirs(),
            "timm, uint8": theirs(use_prefetcher=True),
            "ours": EvalTransform(224),
        },
    }


def measure(runs: dict[str, Run], files: list[bytes], repetitions: int) -> dict[str, np.ndarray]:
    """Returns the seconds an image takes in every repetition, the first one left out."""
    times = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for data in files:
                run(data)
            times[name].append((time.perf_counter() - start) / len(files))
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=30, help="measurements (default: 30)")
    parser.add_argument(
        "--passes", type=int, default=8,
        help="passes over the five photos in each repetition, to average over the random draws "
        "(default: 8)",
    )  # fmt: skip
    args = parser.parse_args()

    timm, torch = peer.import_timm()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm draws from NumPy's global generator
    torch.manual_seed(0)
    files = photos()
    turbo = PIL.features.version("libjpeg_turbo")
    print(f"timm {timm.__version__}, Pillow {PIL.__version__} (libjpeg-turbo {turbo}), ", end="")
    print(f"{np.mean([len(data) for data in files]) / 1e3:.0f} kB an image, {os.cpu_count()} cores")
    header = f"{'':<12}{'':<14}{'images/s':>9}"
    print(header + f"{'timm: median (quartiles)':>28}{'timm, uint8':>24}")
    for what, runs in contenders().items():
        times = measure(runs, files * args.passes, args.repetitions)
        for who, seconds in times.items():
            line = f"{what:<12}{who:<14}{1 / np.median(seconds):>9.0f}"
            for base, width in (("timm", 28), ("timm, uint8", 24)):
                low, median, high = np.percentile(times[base] / seconds, [25, 50, 75])
                line += f"{f'{median:.2f} ({low:.2f} to {high:.2f})':>{width}}"
            print(line if who.startswith("ours") else line[:35])


if __name__ == "__main__":
    main()
