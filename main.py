"""Trains a ConViT.

    python main.py --config=configs/digits.py --workdir=runs/digits

Every key of the configuration can be set on the command line, for example
--config.train.batch_size=32 or --config.model.depth=6. configs/common.py lists the keys with
their units; the other files of configs/ are the models of the paper and small data sets.
"""

from absl import app, flags

from configs import common
from convit_jax import cli, distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: made, or gone on with.")
_PROFILE = flags.DEFINE_bool("profile", False, "Record a trace of a few steps in the workdir.")
# Slurm, Open MPI and TPU pods say these themselves.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Their number, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0, with --coordinator.")
flags.adopt_module_key_flags(cli)
flags.mark_flags_as_required(["config", "workdir"])


def main(rest: list[str]) -> None:
    if rest:
        raise app.UsageError(f"expected only flags, got {' '.join(rest)}")
    with cli.report(ValueError, OSError):
        common.check(cli.CONFIG.value)
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with distributed.failing_together():
        with cli.report(ValueError, OSError, RuntimeError):
            distributed.check_devices()
            distributed.log_from_main()
            from convit_jax import data, startup, train  # not needed for misspelt keys, and slow

            run = startup.prepare(cli.CONFIG.value, _WORKDIR.value, _PROFILE.value)
        with cli.report(OSError, FloatingPointError, data.CorruptImageError):
            startup.use_compilation_cache(run)
            train.train(run)


if __name__ == "__main__":
    cli.run(main)
