"""convit analyse report: a page about a run."""

import argparse
from typing import Any

from convit_jax import storage
from convit_jax.analysis import page, report
from convit_jax.cli import options
from convit_jax.parallel import processes
from convit_jax.train import same_run
from convit_jax.workdir.folder import Workdir

_REPORT = """Writes a page about a run: one HTML file that needs no network.

    convit analyse report --workdir runs/digits

The page has the recipe and the starts of the run, curves of its metrics, gates and non-locality
during training and of its best checkpoint, and what that checkpoint does on the test images:
attention maps, accuracy with parts masked, confusion and the worst mistakes. A run that still
trains has a page too. What needs data that are gone is left out, and the page says so."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the subparsers of `convit analyse`, and returns its parser."""
    command = commands.add_parser(
        "report",
        description=_REPORT,
        help="a page about a run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    command.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="show the averaged weights; default: if the run has any",
    )
    command.add_argument(
        "--out", metavar="FILE", type=options.path, help="file to write; default: DIR/report.html"
    )
    options.add_config(command, "; default: that of the run")
    return command


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the page that the flags ask for. A user's error ends the process with a message."""
    with options.report(ValueError, OSError, RuntimeError):
        processes.check_devices()
        workdir = Workdir(args.workdir)
        config = same_run.config_of_run(workdir)
        if args.config is not None or (config is not None and overrides):
            config = options.configuration(args.config or config, overrides)
        found = report.gather(workdir, config, args.ema)
        if found is not None:
            path = args.out or workdir.report
            storage.make_folder(path.parent)
            storage.write_text(path, page.html(found))
            print(f"wrote {path}")
