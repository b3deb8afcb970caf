"""Evaluates a run, or weights, on the test images of a data set. Each image counts once.

    convit eval --workdir=runs/digits
    convit eval --config=configs/convit_b.py --config.init_from=WEIGHTS

The first line evaluates a run with its own configuration. The second evaluates weights: any source
that convit_jax.load reads. The command prints a table, and the accuracy of each class if there are
at most 20. With --workdir it also writes eval.json there."""

import argparse
from collections.abc import Sequence

from convit_jax.cli import options
from convit_jax.parallel import processes


def main(argv: Sequence[str] | None = None, prog: str = "convit eval") -> None:
    """Parses the flags and evaluates. A user's error ends the process with a message."""
    parser = options.make_parser(prog, __doc__ or "")
    options.add_config(parser, "; default: the configuration of the run in --workdir")
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="folder of the run to evaluate, or only of eval.json")
    options.add_checkpoint(parser)
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="evaluate the averaged weights; default: those of a run that has any, and no others",
    )
    add(
        "--eval_size",
        metavar="SIZES",
        type=options.sizes,
        default=(),
        help="image sizes in pixels to evaluate at, such as 160,224,224x320 (height x width); "
        "default: the model's own size",
    )
    add(
        "--predictions",
        action="store_true",
        help="write file, label and the five most probable classes of every image to "
        "WORKDIR/predictions.jsonl",
    )
    options.add_processes(parser)
    args, overrides = options.parse(parser, argv)
    options.start_logging()
    with options.report(ValueError, OSError):
        config = None
        if args.config is not None:
            config = options.configuration(args.config, overrides)
        processes.initialize(args.coordinator, args.num_processes, args.process_id)
    with processes.failing_together():
        with options.report(ValueError, OSError, RuntimeError):
            processes.check_devices()
            processes.log_from_main()
        from convit_jax.data.corrupt import ImageError
        from convit_jax.train import eval_run, eval_setup, same_run, setup
        from convit_jax.workdir.folder import Workdir

        with options.report(ValueError, OSError):
            workdir = None if args.workdir is None else Workdir(args.workdir)
            if config is None and workdir is not None:
                config = same_run.config_of_run(workdir)
                if config is not None:
                    config = options.configuration(config, overrides)
            choices = eval_setup.Choices(
                args.checkpoint, args.ema, args.eval_size, args.predictions
            )
            run = eval_setup.prepare(config, workdir, choices)
        with options.report(OSError, ImageError):
            setup.use_compilation_cache(run.config, run.workdir)
            eval_run.run(run)
