"""Code that the commands share: flags, configuration, logging, and reports of user errors."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import inspect
import logging
import pathlib
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

import convit_jax
from convit_jax import recipe, storage
from convit_jax.model import image_size

_PACKAGE = pathlib.Path(convit_jax.__file__).parent
# Folder of the configurations: inside an installed package, and beside the package in a checkout.
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def make_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Returns a parser that keeps the line breaks of its description and epilog."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the flag --config and the help of --config.KEY=VALUE flags, which `parse` reads.

    Args:
      parser: the parser to add the flags to.
      more: text to append to the help of --config.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration: a file such as configs/convit_b.py, or one of the names "
        f"{', '.join(shipped_configs())} (with the row of the paper's Table 3: ablations:b){more}",
    )
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        help="value of one key of the configuration, in place of the file's, such as "
        "--config.train.batch_size=256; docs/configuration.md lists the keys",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the flags --weights and --ema."""
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SRC",
        help="weights: a file (.safetensors, .pth, .pt), the workdir of a run, either of them in "
        "a bucket (gs://BUCKET/NAME), or a name on huggingface.co such as convit_base",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the averaged weights of a checkpoint or run; default: those of a run that has "
        "any, and no others",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --checkpoint."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="best",
        help="checkpoint of the run to evaluate: best (by top-1 of the weights that are "
        "evaluated), newest, or a step; default best",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how `weights.load.read_weights` reads weights."""
    parser.add_argument(
        "--variant", metavar="NAME", help="name of the model, if the weights do not determine it"
    )
    parser.add_argument(
        "--offline", action="store_true", help="look for names in the local cache only"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --size."""
    parser.add_argument(
        "--size",
        type=size,
        metavar="PIXELS",
        help="image size in pixels, 384 or 224x320 (height x width); default: the model's own",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that connect the processes of a run."""
    add = parser.add_argument_group(
        "several processes (Slurm, Open MPI, torchrun and TPU pods are recognised without these)"
    ).add_argument
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="host of process 0 and a free port on it; needs --num_processes and --process_id, "
        "except under Slurm, Open MPI and other launchers",
    )
    add(
        "--num_processes",
        type=int,
        metavar="N",
        help="number of processes in the run; needs --coordinator and --process_id",
    )
    add(
        "--process_id",
        type=int,
        metavar="I",
        help="number of this process, from 0; needs --coordinator and --num_processes",
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line of a parser with `add_config`.

    Returns:
      The flags, and the list of --config.KEY=VALUE flags.
    """
    args, rest = parser.parse_known_args(argv)
    overrides: list[str] = []
    unknown: list[str] = []
    for i, word in enumerate(rest):
        follows = i > 0 and rest[i - 1].startswith("--config.") and "=" not in rest[i - 1]
        is_override = word.startswith("--config.") or (follows and not word.startswith("-"))
        (overrides if is_override else unknown).append(word)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args, overrides


def configuration(
    base: str | ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """Returns a configuration after applying the --config.KEY=VALUE flags and checking all keys.

    Args:
      base: the value of --config, such as "convit_b" or "ablations:b", or a configuration.
      overrides: --config.KEY=VALUE flags.

    Raises:
      ValueError: if the file is missing, or a key or value is wrong.
    """
    config = _load(base) if isinstance(base, str) else base
    holder = flags.FlagValues()
    argv = ["convit", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=holder, sys_argv=argv)
        holder(argv)
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from None
    except (AttributeError, KeyError) as error:  # a key that does not exist
        inner = error.args[0]
        message = inner.args[0] if isinstance(inner, KeyError) else inner
        raise ValueError(f"unknown configuration key: {message}") from None
    recipe.check(holder.config)
    return holder.config


def shipped_configs() -> list[str]:
    """Returns the names of the configurations that come with the package."""
    return sorted({path.stem for folder in _CONFIGS for path in folder.glob("*.py")} - {"__init__"})


def _load(text: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a value of --config.

    Args:
      text: path of a file or name of a shipped one, and after a colon the choice that the file
        offers, if it offers any.
    """
    path, choice = _find(text), ""
    if path is None:
        name, _, choice = text.rpartition(":")
        path = _find(name) if choice else None
    if path is None:
        raise ValueError(
            f"--config: no file {text}; expected a file, or one of {', '.join(shipped_configs())}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: expected a Python file (.py), got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {path} has no function get_config()")
    if not choice:
        return module.get_config()
    if not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config: {path} offers no choice: leave out :{choice}")
    return module.get_config(choice)


def _find(text: str) -> pathlib.Path | None:
    """Returns the file of a path or of the name of a shipped configuration; None without one."""
    shipped = [folder / f"{text}.py" for folder in _CONFIGS]
    return next((p for p in (pathlib.Path(text).expanduser(), *shipped) if p.is_file()), None)


def size(text: str) -> image_size.Size:
    """Parses the value of a flag: a size such as 384 or 224x320 (height x width)."""
    with _argument_errors():
        return image_size.parse(text)


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Parses the value of a flag, sizes such as 160,224,224x320, into (height, width) pairs."""
    with _argument_errors():
        return tuple(image_size.pair(image_size.parse(part)) for part in text.split(","))


def path(text: str) -> pathlib.Path:
    """Parses the value of a flag: a path on disk, or gs://BUCKET/NAME or s3://BUCKET/NAME."""
    with _argument_errors():
        return storage.as_path(text)


def positive(text: str) -> int:
    """Parses the value of a flag: a whole number, 1 or more."""
    return _at_least(1, text)


def positives(text: str) -> tuple[int, ...]:
    """Parses the value of a flag: whole numbers, 1 or more, separated by commas."""
    return tuple(positive(part) for part in text.split(","))


def not_negative(text: str) -> int:
    """Parses the value of a flag: a whole number, 0 or more."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
    return int(text)


@contextlib.contextmanager
def _argument_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def start_logging() -> None:
    """Shows the log of this package and the warnings of other packages on standard error."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("convit_jax").setLevel(logging.INFO)
    # Orbax logs the errors that it raises too, with tracebacks, and many details.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def report(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the process with a message, without a traceback, on an exception of these types.

    The types are those of errors that the user can fix.
    """
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")
