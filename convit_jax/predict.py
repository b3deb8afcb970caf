"""Image files to classes.

python -m convit_jax.predict --weights convit_tiny.safetensors photo.jpg
python -m convit_jax.predict --weights runs/mine --json photos/ 'more/*.png'
"""

import argparse
import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import glob
import itertools
import json
import logging
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax import class_names, mixup, weights
from convit_jax.augment import EvalTransform
from convit_jax.decode import decode
from convit_jax.sources import EXTENSIONS


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class and its probability.

    Attributes:
      name: of the class.
      index: of the logit.
      probability: the softmax of it.
    """

    name: str
    index: int
    probability: float


class Predictor:
    """Weights made ready to classify images, compiled for batches of one size.

    predictor = Predictor(weights.read("convit_tiny.safetensors"), batch_size=1)
    predictor.top([predictor.pixels(data)], 5)  # data: the bytes of an image file
    """

    def __init__(self, loaded: weights.Loaded, batch_size: int):
        """
        Args:
          loaded: weights of a classifier of images of 1 or 3 channels.
          batch_size: images at a time.

        Raises:
          ValueError: if they are of another kind.
        """
        model = loaded.model
        if not model.num_classes or model.global_pool == "none":
            raise ValueError(
                f"{loaded.source}: expected a head and global_pool token or avg, got "
                f"num_classes={model.num_classes} and global_pool={model.global_pool}"
            )
        if model.in_channels not in (1, 3):
            raise ValueError(
                f"{loaded.source}: expected 1 or 3 input channels, got {model.in_channels}"
            )
        self.names = class_names.readable(loaded.class_names, model.num_classes)
        self.batch_size = batch_size
        self._transform = EvalTransform(model.image_shape[:2], loaded.crop_pct)
        self._grey = model.in_channels == 1
        self._shape = (batch_size, *model.image_shape)

        def forward(params: Any, images: jax.Array) -> jax.Array:
            images = mixup.normalise(images, loaded.mean, loaded.std)
            return jax.nn.softmax(model.apply({"params": params}, images))

        self._params = jax.device_put(loaded.params)
        images = jax.ShapeDtypeStruct(self._shape, jnp.uint8)
        self._forward = jax.jit(forward).lower(self._params, images).compile()

    def pixels(self, data: bytes) -> np.ndarray:
        """An image file to what the model takes: (height, width, channels) uint8.

        Resized and cropped as in evaluation; in grey where the model was trained so.

        Raises:
          ValueError: if it is not a readable image.
        """
        if not self._grey:
            return self._transform(data)
        from PIL import Image

        grey = np.asarray(Image.fromarray(decode(data)).convert("L"))
        return self._transform(grey[..., None])

    def top(self, images: Sequence[np.ndarray], count: int) -> list[list[Prediction]]:
        """The likeliest classes of up to `batch_size` images, the likeliest first."""
        batch = np.zeros(self._shape, np.uint8)
        batch[: len(images)] = images
        probabilities = np.asarray(self._forward(self._params, batch))[: len(images)]
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :count]
        return [
            [Prediction(self.names[i], int(i), float(row[i])) for i in best]
            for row, best in zip(probabilities, order, strict=True)
        ]


def find_images(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Image files of what is named on a command line, and why some of it gave none.

    Args:
      arguments: files, whatever they are called; folders, searched at any depth for the
        `EXTENSIONS` of images; or patterns such as "photos/*.jpg" and "photos/**/*.jpg".

    Returns:
      Paths in the order of the arguments, sorted within each and given once; and reasons by
      argument.
    """
    paths, reasons = [], {}
    for argument in arguments:
        if os.path.isdir(argument):
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(argument, followlinks=True)
                for name in names
                if name.lower().endswith(EXTENSIONS)
            ]
            reason = f"no images in this folder ({', '.join(EXTENSIONS)})"
        elif glob.has_magic(argument) and not os.path.exists(argument):
            found = [path for path in glob.glob(argument, recursive=True) if os.path.isfile(path)]
            reason = "no file matches this pattern"
        else:
            found, reason = [argument], ""  # whether it is there is seen when it is read
        if not found:
            reasons[argument] = reason
        paths += sorted(found)
    return list(dict.fromkeys(paths)), reasons


def predict_files(
    predictor: Predictor, paths: Iterable[str], count: int = 5
) -> Iterator[tuple[str, list[Prediction] | str]]:
    """(path, predictions), or (path, why it cannot be read), in the order of the paths.

    Files are read and decoded on threads, ahead of the model.
    """

    def read(path: str) -> np.ndarray | str:
        try:
            return predictor.pixels(pathlib.Path(path).read_bytes())
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    def classified(files: list[tuple[str, np.ndarray | str]]) -> Iterator[tuple[str, Any]]:
        images = [image for _, image in files if not isinstance(image, str)]
        found = iter(predictor.top(images, count) if images else ())
        for path, image in files:
            yield path, image if isinstance(image, str) else next(found)

    files: list[tuple[str, np.ndarray | str]] = []
    for path, image in _ahead(read, paths, 2 * predictor.batch_size):
        files.append((path, image))
        if sum(not isinstance(image, str) for _, image in files) == predictor.batch_size:
            yield from classified(files)
            files = []
    yield from classified(files)


def _ahead(function: Any, items: Iterable[str], count: int) -> Iterator[tuple[str, Any]]:
    """(item, function(item)) in order, computed on threads for up to `count` items ahead."""
    items = iter(items)
    with futures.ThreadPoolExecutor() as pool:
        running = collections.deque(
            (item, pool.submit(function, item)) for item in itertools.islice(items, count)
        )
        while running:
            item, future = running.popleft()
            running.extend((x, pool.submit(function, x)) for x in itertools.islice(items, 1))
            yield item, future.result()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convit_jax.predict",
        description="Says what is on images: the likeliest classes of each.",
        epilog="Exit status: 0; 1 if a file could not be read (the rest is predicted) or the "
        "weights could not; 2 for a mistake on the command line.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="file, folder (with all below it) or pattern")
    add(
        "--weights",
        required=True,
        metavar="SRC",
        help="file (.safetensors, .pth, .pt), workdir of a run, or name such as convit_base",
    )
    add("--variant", help="of the model, where the weights do not tell it")
    add("--ema", action="store_true", help="the averaged weights of a checkpoint or run")
    add("--offline", action="store_true", help="look for names in the local cache only")
    add(
        "--size",
        type=_size,
        metavar="PIXELS",
        help="of the images, 384 or 224x320 (height x width); default: the model's own",
    )
    add("--top", type=_positive, default=5, metavar="N", help="classes an image (5)")
    add("--batch", type=_positive, default=32, metavar="N", help="images at a time (32)")
    add("--json", action="store_true", help="a line of JSON an image")
    add("--timing", action="store_true", help="say how long loading, compiling and running took")
    return parser.parse_args(arguments)  # fmt: skip


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def _size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a number or HEIGHTxWIDTH, got {text!r}")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def _shown(path: str, predictions: list[Prediction]) -> str:
    """A table of one image's classes."""
    rows = [f"  {p.probability:7.2%}  {p.name}" for p in predictions]
    return "\n".join([path, *rows])


def _json_line(path: str, found: list[Prediction] | str) -> str:
    key = "error" if isinstance(found, str) else "predictions"
    value = found if isinstance(found, str) else [dataclasses.asdict(p) for p in found]
    return json.dumps({"file": path, key: value})


@contextlib.contextmanager
def _progress(total: int, batch_size: int) -> Iterator[Any]:
    """A bar on a terminal, if there is more than one batch."""
    import tqdm

    hidden = total <= batch_size or not sys.stderr.isatty()
    with tqdm.tqdm(total=total, unit="image", leave=False, disable=hidden) as bar:
        yield bar


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("convit_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's, which raises what matters too
    marks = [time.perf_counter()]
    paths, failures = find_images(args.images)
    overrides = {} if args.size is None else {"image_size": args.size}
    try:
        loaded = weights.read(
            args.weights, args.variant, ema=args.ema, offline=args.offline, **overrides
        )
        marks.append(time.perf_counter())
        predictor = Predictor(loaded, min(args.batch, max(1, len(paths))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    marks.append(time.perf_counter())
    with _progress(len(paths), predictor.batch_size) as bar:
        for path, found in predict_files(predictor, paths, args.top):
            if isinstance(found, str):
                failures[path] = found
            else:
                bar.write(_json_line(path, found) if args.json else _shown(path, found))
            bar.update()
    marks.append(time.perf_counter())
    if args.timing:
        load, compiling, run = np.diff(marks)
        print(f"load {load:.2f} s, compile {compiling:.2f} s, run {run:.2f} s", file=sys.stderr)
    if failures:
        for path, reason in failures.items() if args.json else ():
            print(_json_line(path, reason))
        lines = (f"\n  {path}: {reason}" for path, reason in failures.items())
        count = len(paths) + len(failures.keys() - set(paths))
        print(f"error: {len(failures)} of {count} not read:{''.join(lines)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
