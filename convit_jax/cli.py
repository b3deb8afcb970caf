"""What the commands share: --config, --help, and the user's errors said without a traceback."""

from collections.abc import Callable, Iterator
import contextlib
import logging
import sys
import traceback

from absl import app
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: a file of configs/.")


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, then runs a command on what was not a flag."""

    def logged(argv: list[str]) -> None:
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        logging.getLogger("convit_jax").setLevel(logging.INFO)
        # Orbax logs, with tracebacks, what it also raises, and much that is no concern of ours.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        main(argv[1:])

    app.run(logged, flags_parser=_parse_flags)


@contextlib.contextmanager
def report(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the process with the message of an error of these kinds, which the user can mend."""
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")


def _parse_flags(argv: list[str]) -> list[str]:
    if {"--help", "-h"}.intersection(argv):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)  # absl's own --help exits with 1
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # an override of a key that there is not
        if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a mistake in the file itself
        inner = error.args[0]
        message = inner.args[0] if isinstance(inner, KeyError) else inner
        sys.exit(f"error: unknown configuration key: {message}")
