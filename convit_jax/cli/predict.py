"""Classifies image files: prints the most probable classes of each image.

convit predict --weights convit_tiny.safetensors photo.jpg
convit predict --weights runs/mine --json photos/ 'more/*.png'
convit predict --weights convit_tiny --attention maps/ photo.jpg"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import sys
import time
from typing import Any

import numpy as np

from convit_jax.cli import options
from convit_jax.predict import Prediction, Predictor, find_images, predict_files
from convit_jax.predict.attention import AttentionPictures
from convit_jax.weights.digest import digest
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

_EPILOG = (
    "Exit status: 0 on success; 1 if the weights or a file could not be read (the other files are\n"
    "predicted, unless a bucket does not answer); 2 for an error on the command line."
)


def main(argv: Sequence[str] | None = None, prog: str = "convit predict") -> int:
    """Runs the command, and returns its exit status."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    if args.heads and args.attention is None:
        parser.error("--heads: expected with --attention DIR")
    options.start_logging()
    marks = [time.perf_counter()]
    with options.report(OSError):
        paths, failures = find_images(args.images)
    overrides = {} if args.size is None else {"image_size": args.size}
    with options.report(ValueError, OSError):
        loaded = read_weights(
            args.weights, args.variant, ema=args.ema, offline=args.offline, **overrides
        )
        marks.append(time.perf_counter())
        predictor = Predictor(loaded, min(args.batch, max(1, len(paths))))
        output = _Output(loaded, args)
    marks.append(time.perf_counter())
    with options.report(OSError), _progress(len(paths), predictor.batch_size) as bar:
        for path, found in predict_files(predictor, paths, args.top, output.watch):
            if isinstance(found, str):
                failures[path] = found
            else:
                bar.write(output.line(path, found))
                sys.stdout.flush()  # for a reader at the other end of a pipe
            bar.update()
    marks.append(time.perf_counter())
    if args.timing:
        load, compiling, run = np.diff(marks)
        print(f"load {load:.2f} s, compile {compiling:.2f} s, run {run:.2f} s", file=sys.stderr)
    if failures:
        for path, reason in failures.items() if args.json else ():
            print(json.dumps({"file": path, "error": reason}))
        lines = (f"\n  {path}: {reason}" for path, reason in failures.items())
        count = len(paths) + len(failures.keys() - set(paths))
        print(f"error: {len(failures)} of {count} not read:{''.join(lines)}", file=sys.stderr)
    return 1 if failures else 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(prog, __doc__ or "", _EPILOG)
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="file, folder searched at any depth, or pattern; any of them may be in a bucket "
        "(gs://BUCKET/NAME)",
    )
    options.add_weights(parser)
    options.add_reading(parser)
    options.add_size(parser)
    add("--top", type=options.positive, default=5, metavar="N", help="classes per image; default 5")
    add(
        "--batch",
        type=options.positive,
        default=32,
        metavar="N",
        help="images per batch of the model; default 32",
    )
    add("--json", action="store_true", help="print one line of JSON for each image")
    add("--timing", action="store_true", help="print the time of loading, compiling and running")
    add(
        "--attention",
        metavar="DIR",
        help="write NAME.attention.png into this folder for each image: the picture beside the "
        "attention of the class token in the last layer, as the mean of the heads; the gates of "
        "the GPSA layers are printed",
    )
    add(
        "--heads",
        action="store_true",
        help="draw every head of every layer with a class token; needs --attention",
    )
    return parser


class _Output:
    """What is printed of each image, and the pictures of its attention."""

    def __init__(self, loaded: Loaded, args: argparse.Namespace):
        self._json, self._files = args.json, dict[str, str]()
        self._pictures: AttentionPictures | None = None
        self._gates_printed = False
        if args.attention is not None:
            self._pictures = AttentionPictures(loaded, args.attention, every_head=args.heads)
        self._made_with: dict[str, Any] = {}
        if args.json:
            self._made_with = {
                "weights": {"source": loaded.source, "sha256": digest(loaded.params)},
                "preprocessing": loaded.preprocessing,
            }

    def watch(self, paths: list[str], images: np.ndarray) -> None:
        """Draws the attention of a batch."""
        if self._pictures is not None:
            files = self._pictures.write(paths, images)
            self._files = dict(zip(paths, files, strict=True))

    def line(self, path: str, found: list[Prediction]) -> str:
        """Returns the text of one image."""
        if self._json:
            predictions = [dataclasses.asdict(p) for p in found]
            line: dict[str, Any] = {"file": path, "predictions": predictions}
            if self._pictures is not None:
                line |= {"attention": self._files[path], "gates": self._pictures.gates.tolist()}
            return json.dumps({**line, **self._made_with})
        rows = [f"  {p.probability:7.2%}  {p.name}" for p in found]
        if self._pictures is not None:
            rows.append(f"  {self._files[path]}")
        return "\n".join([*self._gates(), path, *rows])

    def _gates(self) -> list[str]:
        """Returns the gates as lines, once; they belong to the weights, not to an image."""
        if self._pictures is None or self._gates_printed or not len(self._pictures.gates):
            return []
        self._gates_printed = True
        rows = enumerate(self._pictures.gates, 1)
        lines = (f"  layer {i:2}  {'  '.join(f'{gate:.2f}' for gate in row)}" for i, row in rows)
        return ["gates (share of the positional attention in each head)", *lines]


@contextlib.contextmanager
def _progress(total: int, batch_size: int) -> Iterator[Any]:
    """Shows a progress bar on a terminal if there is more than one batch."""
    import tqdm

    hidden = total <= batch_size or not sys.stderr.isatty()
    with tqdm.tqdm(total=total, unit="image", leave=False, disable=hidden) as bar:
        yield bar
