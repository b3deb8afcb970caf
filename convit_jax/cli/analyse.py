"""Measures how a model attends: the paper's study of locality, on any weights and images.

convit analyse gates --weights convit_tiny
convit analyse nonlocality --weights runs/digits
convit analyse maps --weights convit_tiny --out maps photo.jpg
convit analyse masking --weights runs/digits
convit analyse report --workdir runs/digits

The first four print a table. With --out they also write JSON and pictures. The last one writes a
page about a run."""

import argparse
from collections.abc import Callable, Iterator, Sequence
import os
from typing import Any

import ml_collections
import numpy as np

from convit_jax import recipe, storage
from convit_jax.analysis import images, measured, pictures, tables
from convit_jax.analysis.images import Image
from convit_jax.cli import options, run_report
from convit_jax.data.corrupt import ImageError
from convit_jax.model import image_size
from convit_jax.model.locality import PARTS
from convit_jax.parallel import processes
from convit_jax.predict.attention import draw
from convit_jax.train import eval_report, eval_setup, init_from, same_run, setup
from convit_jax.weights import hub
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

_GATES = """Prints the gates: the share of the positional attention in each head (figure 6)."""
_NONLOCALITY = """Prints the non-locality of each layer and head (equation 8, figure 5).

    convit analyse nonlocality --weights convit_tiny photos/
    convit analyse nonlocality --weights runs/digits

Non-locality is the mean distance in patches from a query to the patches that it attends to. Without
IMAGE, test images of the run's data set are taken, or of another one that --config.data.source
names. The class token of plain layers is left out, and the rest of a row is divided by its sum."""
_MAPS = """Draws the attention of query patches in every head (figure 7).

    convit analyse maps --weights convit_tiny --layers 1,5,10 --query 4,9 --out maps photo.jpg

With --out, a picture is written for each image and query: a row for each layer, with the image, in
which the query is framed, the mean of the heads, and every head. Each map is drawn from black, no
attention, to light yellow, its maximum."""
_MASKING = """Evaluates weights with position or content masked (Tables 5 and 6).

    convit analyse masking --weights runs/digits
    convit analyse masking --weights convit_tiny --config.data.source=folder:DIR

The test images of the run's data set are evaluated, or those of another one that
--config.data.source names, once without the position embedding, and with the content part or the
positional part of the attention masked in the first GPSA layers."""


def main(argv: Sequence[str] | None = None, prog: str = "convit analyse") -> None:
    """Parses the flags and runs a command. A user's error ends the process with a message."""
    parser, commands = _parser(prog)
    args, overrides = options.parse(parser, argv)
    options.start_logging()
    if overrides and "config" not in args:
        commands[args.command].error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.command in ("masking", "report"):
        (_masking if args.command == "masking" else run_report.run)(args, overrides)
        return
    with options.report(ValueError, OSError, ImageError):
        size = {} if getattr(args, "size", None) is None else {"image_size": args.size}
        loaded = read_weights(
            args.weights, args.variant, ema=args.ema, offline=args.offline, **size
        )
        if args.command == "gates":
            found = measured.measure_gates(loaded)
            _show(args, tables.gates(found), found, pictures.gates)
        elif args.command == "nonlocality":
            found = measured.measure_nonlocality(loaded, _images(args, overrides, loaded))
            _show(args, tables.nonlocality(found), found, pictures.nonlocality)
        else:
            _maps(args, overrides, loaded)


def _parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser, and that of each command by name."""
    parser = options.make_parser(prog, __doc__ or "")
    added = parser.add_subparsers(
        dest="command", required=True, metavar="gates | nonlocality | maps | masking | report"
    )
    made: dict[str, argparse.ArgumentParser] = {}
    for name, description, short in (
        ("gates", _GATES, "the gates of every head"),
        ("nonlocality", _NONLOCALITY, "how far every head attends"),
        ("maps", _MAPS, "what query patches attend to"),
        ("masking", _MASKING, "the accuracy without position or content"),
    ):
        made[name] = command = added.add_parser(
            name,
            description=description,
            help=short,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        options.add_weights(command)
        if name != "masking":
            options.add_reading(command)
        if name != "gates":
            options.add_size(command)
            options.add_config(command, "; default: that of the run, or the recipe for ImageNet")
        command.add_argument(
            "--out", metavar="DIR", type=options.path, help="folder of JSON and pictures to write"
        )
    _add_images(made["nonlocality"], 64)
    _add_images(made["maps"], 4)
    _add_maps(made["maps"])
    made["masking"].add_argument(
        "--first",
        metavar="N,N",
        type=options.positives,
        help="numbers of GPSA layers to mask, counted from the input, such as 3,5,10; default: "
        "3, 5 and 10 of 10 layers, and in proportion of another number",
    )
    options.add_checkpoint(made["masking"])
    options.add_processes(made["masking"])
    made["report"] = run_report.add(added)
    return parser, made


def _add_images(command: argparse.ArgumentParser, count: int) -> None:
    command.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="file, folder searched at any depth, or pattern; default: test images of a data set",
    )
    command.add_argument(
        "--count",
        type=options.positive,
        default=count,
        metavar="N",
        help=f"number of test images, spread evenly over the data set; default {count}",
    )


def _add_maps(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layers",
        metavar="N,N",
        type=options.positives,
        help="layers, counted from 1; default: all",
    )
    command.add_argument(
        "--query",
        metavar="ROW,COLUMN",
        type=_patch,
        action="append",
        help="patch that attends, counted from 1; may be given several times; default: the "
        "central one",
    )
    command.add_argument(
        "--part",
        choices=PARTS,
        default="blended",
        help="attention to draw: blended, as the model uses it, or the content part or the "
        "positional part of it; default blended",
    )


def _patch(text: str) -> tuple[int, int]:
    numbers = options.positives(text)
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN such as 7,7, got {text}")
    return numbers[0], numbers[1]


def _images(args: argparse.Namespace, overrides: list[str], loaded: Loaded) -> Iterator[Image]:
    """Returns the images that the flags name."""
    if not args.images:
        config, workdir = _configuration(args, overrides)
        return images.of_test_split(loaded, config, workdir, args.count)
    if args.config is not None or overrides:
        raise ValueError("IMAGE: expected images or a configuration with a data set, got both")
    return images.of_files(loaded, args.images)


def _configuration(
    args: argparse.Namespace, overrides: list[str]
) -> tuple[ml_collections.ConfigDict, Workdir | None]:
    """Returns the configuration that the flags choose, and the workdir of the weights' run."""
    saved = workdir = None
    path = storage.as_path(args.weights)
    if path.is_dir() and hub.cloned(path) is None:
        workdir = Workdir(args.weights)
        saved = same_run.config_of_run(workdir)
    if saved is not None:
        return options.configuration(args.config or saved, overrides), workdir
    config = options.configuration(args.config or _open_recipe(), overrides)
    config.init_from = args.weights
    return config, None


def _open_recipe() -> ml_collections.ConfigDict:
    """Returns the recipe with a model that the weights decide."""
    config = recipe.get_config()
    config.model.image_size = None
    return config


def _as_the_weights(
    args: argparse.Namespace, overrides: list[str], config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns the recipe with the normalisation and the crop that the weights state."""
    heads = init_from.stated_heads(config)
    loaded = read_weights(args.weights, ema=args.ema, heads_if_open=heads)
    base = _open_recipe()
    base.init_from = args.weights
    base.data.update(mean=loaded.mean, std=loaded.std)
    base.augment.eval_crop = loaded.crop_pct
    return options.configuration(base, overrides)


def _maps(args: argparse.Namespace, overrides: list[str], loaded: Loaded) -> None:
    seen: list[np.ndarray] = []  # the pixels of the images, for the pictures

    def kept() -> Iterator[Image]:
        for name, pixels in _images(args, overrides, loaded):
            if args.out is not None:
                seen.append(pixels)
            yield name, pixels

    found = measured.measure_maps(
        loaded, kept(), layers=args.layers, queries=args.query, part=args.part
    )
    _show(args, tables.maps(found), found, None)
    queries = len(found["maps"]) // max(1, len(seen))
    for number, of_query in enumerate(found["maps"] if args.out is not None else ()):
        row, column = of_query["query"]
        image = number // queries
        name = os.path.basename(of_query["image"])
        path = args.out / f"{image + 1}-{name}.{row}-{column}.png"
        picture = draw(
            seen[image],
            np.asarray(of_query["attention"]),
            every_head=True,
            query=(row - 1, column - 1),
        )
        with storage.whole_file(path) as unfinished:
            picture.save(unfinished, "PNG")
        print(f"wrote {path}")


def _masking(args: argparse.Namespace, overrides: list[str]) -> None:
    with options.report(ValueError, OSError):
        config, workdir = _configuration(args, overrides)
        processes.initialize(args.coordinator, args.num_processes, args.process_id)
    with processes.failing_together():
        with options.report(ValueError, OSError, RuntimeError):
            processes.check_devices()
            processes.log_from_main()
        with options.report(ValueError, OSError, ImageError):
            if workdir is None and args.config is None:
                config = _as_the_weights(args, overrides, config)
            sizes = () if args.size is None else (image_size.pair(args.size),)
            choices = eval_setup.Choices(args.checkpoint, args.ema, sizes)
            prepared = eval_setup.prepare(config, workdir, choices)
            setup.use_compilation_cache(prepared.config, prepared.workdir)
            found = measured.measure_masking(prepared, args.first)
            if found is not None and processes.is_main():
                _show(args, tables.masking(found), found, pictures.masking)


def _show(
    args: argparse.Namespace,
    table: str,
    found: dict[str, Any],
    picture: Callable[[dict[str, Any]], Any] | None,
) -> None:
    """Prints a table; with --out, writes COMMAND.json and the picture COMMAND.png."""
    print(table, flush=True)
    if args.out is None:
        return
    drawn = None if picture is None else picture(found)  # before anything is written
    storage.make_folder(args.out)
    path = args.out / f"{args.command}.json"
    storage.write_text(path, eval_report.to_json(found))
    print(f"wrote {path}")
    if drawn is not None:
        path = args.out / f"{args.command}.png"
        pictures.save(drawn, path)
        print(f"wrote {path}")
