"""Trains a ConViT.

    python main.py --config=configs/digits.py --workdir=/tmp/digits

Every key of the configuration can be set on the command line, for example
--config.train.batch_size=32 or --config.model.depth=6. configs/common.py lists the keys with
their units; the other files of configs/ are the models of the paper and configs/digits.py.
"""

import logging
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from configs import common

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for what the run writes; made if missing.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected only flags, got {' '.join(argv[1:])}")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("convit_jax").setLevel(logging.INFO)
    try:
        common.check(_CONFIG.value)
        from convit_jax import train  # jax and all: not for --help and misspelt keys

        run = train.prepare(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError) as error:  # the user's to mend
        sys.exit(f"error: {error}")
    try:
        train.train(run)
    except FloatingPointError as error:
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


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
