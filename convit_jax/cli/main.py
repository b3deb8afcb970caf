"""Dispatch to the commands: `convit train`, `convit eval` and so on."""

from collections.abc import Sequence
import importlib
import sys

from convit_jax import __version__, extras

# Command -> (its line in the usage text, the extra of setup.cfg that it needs).
COMMANDS = {
    "train": ("train a model, or continue a run", "train"),
    "eval": ("evaluate a run or weights on a data set", "train"),
    "predict": ("classify image files", "predict"),
    "convert": ("convert weights between PyTorch, this project and StableHLO", "weights"),
    "data": ("check a data set, or prepare ImageNet", "train"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names, and exits with its status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"convit-jax {__version__}")
        sys.exit(0)
    name, *rest = argv
    if name not in COMMANDS:
        sys.exit(f"error: no command {name!r}: expected one of {', '.join(COMMANDS)}")
    run(name, rest, f"convit {name}")


def run(name: str, argv: Sequence[str], prog: str) -> None:
    """Runs a command, and exits with its status.

    Args:
      name: a key of `COMMANDS`.
      argv: arguments of the command.
      prog: the words that start the command, for its help text.
    """
    try:
        with extras.needed(COMMANDS[name][1], prog):
            command = importlib.import_module(f"convit_jax.cli.{name}")
            sys.exit(command.main(argv, prog))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")


def usage() -> str:
    """Returns the help text with the list of commands."""
    lines = [f"  {name:<9}{text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: convit COMMAND ...",
            "",
            "ConViT, the vision transformer with gated positional self-attention, in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "convit COMMAND --help explains a command. `python -m convit_jax` works like `convit`.",
        ]
    )
