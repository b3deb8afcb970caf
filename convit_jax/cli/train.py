"""Trains a ConViT or DeiT, or continues a run.

    convit train --config=digits --workdir=runs/digits
    convit train --config=configs/convit_b.py --config.data.dir=DATA --workdir=DIR
    convit train --workdir=DIR

Training uses all devices of the machine. Checkpoints, metrics and the final weights are written to
the folder --workdir. After an interruption, the same command continues the run. Without --config,
the run in --workdir continues with its own configuration."""

from collections.abc import Sequence
import logging

from convit_jax.cli import options
from convit_jax.parallel import accelerators, processes
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = "convit train") -> int:
    """Parses the flags and trains; returns the exit status.

    A user's error ends the process with a message.
    """
    parser = options.make_parser(prog, __doc__ or "")
    options.add_config(parser)
    add = parser.add_argument
    add(
        "--workdir",
        metavar="DIR",
        required=True,
        help="folder of the run, made if missing; or gs://BUCKET/RUN, s3://BUCKET/RUN",
    )
    add("--profile", action="store_true", help="record a trace of five steps in WORKDIR/profile")
    add(
        "--stopped_status",
        type=options.not_negative,
        default=0,
        metavar="N",
        help="exit status of a run that a signal stops before its end (default: 0); with N=75, a "
        "scheduler can tell it from a finished run and start it again",
    )
    options.add_processes(parser)
    args, overrides = options.parse(parser, argv)
    if args.stopped_status > 255:
        parser.error(f"--stopped_status: expected at most 255, got {args.stopped_status}")
    options.start_logging()
    with options.report(ValueError, OSError):
        workdir = Workdir(args.workdir)
        base = args.config
        if base is None:
            from convit_jax.train import same_run

            base = same_run.config_of_run(workdir)
            if base is None:
                parser.error(f"--config: expected one, since {workdir} holds no run to continue")
        config = options.configuration(base, overrides)
        processes.initialize(args.coordinator, args.num_processes, args.process_id)
    with processes.failing_together():
        with options.report(ValueError, OSError, RuntimeError):
            processes.check_devices()
            processes.log_from_main()
        from convit_jax.data.corrupt import ImageError
        from convit_jax.train import loop, setup

        if (found := accelerators.unused()) and processes.is_main():
            log.warning("%s", found)
        with options.report(ValueError, OSError, RuntimeError):
            run = setup.prepare(config, workdir, args.profile)
        with options.report(OSError, FloatingPointError, ImageError, processes.RemoteError):
            setup.use_compilation_cache(config, workdir)
            stopped = loop.train(run) is None
        if stopped and args.stopped_status:
            processes.disconnect()
    return args.stopped_status if stopped else 0
