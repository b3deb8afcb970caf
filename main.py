"""Trains a ConViT.

    python main.py --config=configs/digits.py --workdir=runs/digits

Every key of the configuration can be set on the command line, for example
--config.train.batch_size=32 or --config.model.depth=6. configs/common.py lists the keys with
their units; the other files of configs/ are the models of the paper and small data sets.
"""

from absl import app, flags

from configs import common
from convit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for what the run writes; made if missing.")
flags.adopt_module_key_flags(cli)
flags.mark_flags_as_required(["config", "workdir"])


def main(rest: list[str]) -> None:
    if rest:
        raise app.UsageError(f"expected only flags, got {' '.join(rest)}")
    with cli.report(ValueError, OSError):
        common.check(cli.CONFIG.value)
        from convit_jax import data, startup, train  # not needed for misspelt keys, and slow

        run = startup.prepare(cli.CONFIG.value, _WORKDIR.value)
    with cli.report(FloatingPointError, data.CorruptImageError):
        train.train(run)


if __name__ == "__main__":
    cli.run(main)
