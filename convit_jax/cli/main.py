"""Dispatch to the commands: `convit train`, `convit eval` and so on."""

from collections.abc import Callable, Sequence
import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback

from convit_jax import __version__, extras

# Command -> (its line in the usage text, the extra of setup.cfg that it needs).
COMMANDS = {
    "train": ("train a model, or continue a run", "train"),
    "eval": ("evaluate a run or weights on a data set", "train"),
    "predict": ("classify image files", "predict"),
    "convert": ("convert weights between PyTorch, this project and StableHLO", "weights"),
    "analyse": ("measure how a model attends: the paper's study of locality", "study"),
    "data": ("check a data set, or prepare ImageNet", "train"),
    "plan": ("say what training costs on a TPU pod that is not there", "train"),
    "study": ("repeat the paper's study of locality: runs, tables, pictures", "study"),
}

# New objects after which Python looks for garbage, many times its default. Tracing and lowering a
# model make many objects that stay, through which it would look again and again.
_NEW_OBJECTS = 50_000


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


def start(command: Callable[[], None] = main) -> None:
    """Runs a command as the whole of this process: if the command fails, the process ends at once.

    A normal exit of Python waits for every thread, and after an error a library may leave a thread
    that never ends. If the command succeeds, Python exits normally.

    Args:
      command: the command, which reads `sys.argv` and may raise SystemExit.
    """
    gc.set_threshold(_NEW_OBJECTS)
    try:
        command()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        status = _report(error)
    else:
        return
    with contextlib.suppress(Exception):  # nothing may keep the process from its end
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join(1)
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the reader of a pipe may be gone
            stream.flush()
    if isinstance(status, signal.Signals):  # so that a shell sees that a signal ended the process
        signal.signal(status, signal.SIG_DFL)
        os.kill(os.getpid(), status)
    os._exit(status)


def _report(error: BaseException) -> int:
    """Prints an error as Python would; returns the exit status, or the signal to end by."""
    with contextlib.suppress(OSError):
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


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
