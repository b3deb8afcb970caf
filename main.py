"""Trains a ConViT, or evaluates one.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --mode=eval --workdir=runs/digits
    python main.py --mode=eval --config=configs/convit_b.py --config.init_from=WEIGHTS

Every key of the configuration can be set on the command line, for example
--config.train.batch_size=32 or --config.model.depth=6. configs/common.py lists the keys with
their units; the other files of configs/ are the models of the paper and small data sets.

Evaluated is the run in --workdir, by its own configuration unless --config is given, or WEIGHTS:
all that convit_jax.load reads. A table is printed; with --workdir, eval.json is written there.
"""

from absl import app, flags

from configs import common
from convit_jax import cli, distributed

_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: made, or gone on with.")
_PROFILE = flags.DEFINE_bool("profile", False, "Record a trace of a few steps in the workdir.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "eval: best (by top-1), newest or a step.")
_EMA = flags.DEFINE_bool("ema", False, "eval: the averaged weights.")
_EVAL_SIZE = flags.DEFINE_string("eval_size", "", "eval: at these sizes, such as 160,224,224x320.")
_PREDICTIONS = flags.DEFINE_bool("predictions", False, "eval: write predictions.jsonl as well.")
# Slurm, Open MPI and TPU pods say these themselves.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Their number, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0, with --coordinator.")
flags.adopt_module_key_flags(cli)


def main(rest: list[str]) -> None:
    if rest:
        raise app.UsageError(f"expected only flags, got {' '.join(rest)}")
    for name in ("config", "workdir") if _MODE.value == "train" else ():
        if not flags.FLAGS[name].value:
            raise app.UsageError(f"Flag --{name} must have a value to train.")
    with cli.report(ValueError, OSError):
        if cli.CONFIG.value is not None:
            common.check(cli.CONFIG.value)
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with distributed.failing_together():
        with cli.report(ValueError, OSError, RuntimeError):
            distributed.check_devices()
            distributed.log_from_main()
        _train() if _MODE.value == "train" else _evaluate()


def _train() -> None:
    from convit_jax import data, startup, train  # not needed for misspelt keys, and slow

    with cli.report(ValueError, OSError, RuntimeError):
        run = startup.prepare(cli.CONFIG.value, _WORKDIR.value, _PROFILE.value)
    with cli.report(OSError, FloatingPointError, data.CorruptImageError):
        startup.use_compilation_cache(run.config, run.workdir)
        train.train(run)


def _evaluate() -> None:
    from convit_jax import data, eval_run, startup

    with cli.report(ValueError, OSError):
        sizes = eval_run.parse_sizes(_EVAL_SIZE.value)
        options = eval_run.Options(_CHECKPOINT.value, _EMA.value, sizes, _PREDICTIONS.value)
        run = eval_run.prepare(cli.CONFIG.value, _WORKDIR.value, options)
    with cli.report(OSError, data.CorruptImageError):
        startup.use_compilation_cache(run.config, run.workdir)
        eval_run.run(run)


if __name__ == "__main__":
    cli.run(main)
