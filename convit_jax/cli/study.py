"""Repeats the paper's study of locality: trains the runs of a table and prints it.

    convit study sample-efficiency
    convit study ablations --seeds=5 --out=runs/study
    convit study sample-efficiency --config=convit_s --config.data.dir=DATA --print
    convit study sample-efficiency --config=convit_s --config.data.dir=DATA --collect

Studies:
  sample-efficiency  ConViT and DeiT on some of the training images (Table 2)
  ablations          ConViT without some of its parts (Table 3)
  locality           numbers of GPSA layers and locality strengths (Figure 8)
  masking            ConViT and DeiT with parts masked after training (Tables 5 and 6)

The runs are trained one after another, in folders below --out. A run that has finished is not
trained again and an interrupted one continues, so the same command continues a study. Studies of
the same configuration share the runs that they have in common. At the end the table is printed,
and written with a picture and a JSON file into --out."""

import argparse
from collections.abc import Callable, Sequence
import logging
import pathlib

import ml_collections

from convit_jax import saved_config
from convit_jax.cli import options
from convit_jax.storage import write_text
from convit_jax.study import picture, plans, results, runner
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

_DEFAULT = "mnist5k"  # configuration of data that come with a package
_STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def main(argv: Sequence[str] | None = None, prog: str = "convit study") -> None:
    """Parses the flags, trains what is missing and writes the table."""
    parser = options.make_parser(prog, __doc__ or "")
    options.add_config(parser, f"; the default is {_DEFAULT}")
    _add_flags(parser)
    args, overrides = options.parse(parser, argv)
    options.start_logging()
    base = args.config or _DEFAULT
    with options.report(ValueError, OSError, RuntimeError, ModuleNotFoundError):
        config = options.configuration(base, overrides)
        _check_flags(args)
        plans.check_base(config)
        study = _STUDIES[args.study](args, config)
        configs = {run: options.configuration(base, [*overrides, *run.flags]) for run in study.runs}
        for wanted in configs.values():
            plans.check_run(wanted)
        name = pathlib.PurePath(base.replace(".py", "")).name.replace(":", "_")
        folder = args.out / name
        jobs = runner.jobs(study, base, overrides, folder)
        if args.print:
            for job in jobs:
                print(runner.command_text(job.words))
            return
        for run, wanted in configs.items():
            runner.check(Workdir(folder / run.name), wanted)
        todo = [job for job in jobs if not job.result.exists()]
        done = len(jobs) - len(todo)
        log.info("%s: %d of %d commands have finished in %s", study.name, done, len(jobs), folder)
        stopped = bool(todo) and not args.collect and not runner.run_all(study, folder, todo)
        _write(study, folder, config)
        if stopped:
            log.info("stopped: the same command continues the study")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", choices=tuple(_STUDIES), help="the table to make")
    add(
        "--out",
        metavar="DIR",
        type=options.path,
        default="runs/study",
        help="folder of tables and runs; the default is runs/study",
    )
    add(
        "--seeds",
        type=options.positive,
        metavar="N",
        default=3,
        help="number of runs in each cell, with seeds 0 to N - 1; the default is 3",
    )
    add(
        "--shares",
        type=_shares,
        metavar="A,B,...",
        help="shares of the training images, up to 1: the columns of sample-efficiency (default: "
        "0.05,0.1,0.3,0.5,1 as in the paper, and 0.01,0.05,0.1,0.3,1 for mnist5k) and of "
        "ablations (default: 1,0.1), and the one share of locality (default: 1)",
    )
    add(
        "--strengths",
        type=_numbers,
        metavar="A,B,...",
        help="locality strengths, the columns of locality; the default is "
        + ",".join(f"{x:g}" for x in _STRENGTHS),
    )
    add(
        "--layers",
        type=options.positives,
        metavar="A,B,...",
        help="numbers of GPSA layers, the rows of locality; the default is a third, two thirds "
        "and all of the configuration's",
    )
    what = parser.add_mutually_exclusive_group().add_argument
    what(
        "--print",
        action="store_true",
        help="print the command of each run and train nothing, for a cluster",
    )
    what(
        "--collect",
        action="store_true",
        help="train nothing, and make table and picture of the runs that have finished",
    )


def _check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError if a flag has no meaning for the study."""
    used = {"locality": ("shares", "strengths", "layers"), "masking": ()}.get(
        args.study, ("shares",)
    )
    for flag in ("shares", "strengths", "layers"):
        if flag not in used and getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: has no meaning for the study {args.study}")


def _sample_efficiency(args: argparse.Namespace, config: ml_collections.ConfigDict) -> plans.Study:
    small = config.data.source == "mnist5k"
    default = plans.SMALL_SHARES if small else plans.PAPER_SHARES
    return plans.sample_efficiency(config, range(args.seeds), args.shares or default)


def _ablations(args: argparse.Namespace, config: ml_collections.ConfigDict) -> plans.Study:
    return plans.ablation_study(config, range(args.seeds), args.shares or (1.0, 0.1))


def _locality(args: argparse.Namespace, config: ml_collections.ConfigDict) -> plans.Study:
    share = args.shares or (1.0,)
    if len(share) > 1:
        raise ValueError(f"--shares: expected one share for locality, got {share}")
    layers, strengths = args.layers or plans.figure_8_layers(config), args.strengths or _STRENGTHS
    return plans.locality(config, range(args.seeds), strengths, layers, share[0])


def _masking(args: argparse.Namespace, config: ml_collections.ConfigDict) -> plans.Study:
    return plans.masking_study(config, range(args.seeds))


_STUDIES: dict[str, Callable[[argparse.Namespace, ml_collections.ConfigDict], plans.Study]] = {
    "sample-efficiency": _sample_efficiency,
    "ablations": _ablations,
    "locality": _locality,
    "masking": _masking,
}


def _write(study: plans.Study, folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Prints the table of a study, and writes it with its picture and JSON."""
    found = results.collect(study, folder)
    if not any(result.values for result in found.values()):
        log.info("no run has finished yet: no table")
        return
    table = results.markdown(study, found)
    print(f"{study.title}; columns: {study.across}\n\n{table}", end="")
    place = folder / study.name
    write_text(place.with_name(f"{study.name}.md"), table)
    write_text(
        place.with_name(f"{study.name}.json"),
        results.to_json(study, found, saved_config.to_json(config)),
    )
    picture.draw(study, found, place.with_name(f"{study.name}.png"))
    log.info("wrote %s.md, .json and .png", place)


def _numbers(text: str) -> tuple[float, ...]:
    """Parses the value of a flag: positive numbers, separated by commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"expected positive numbers such as 0.1,1, got {text}")
    return tuple(dict.fromkeys(numbers))


def _shares(text: str) -> tuple[float, ...]:
    """Parses the value of a flag: shares, above 0 and up to 1, separated by commas."""
    numbers = _numbers(text)
    if max(numbers) > 1:
        raise argparse.ArgumentTypeError(f"expected shares up to 1 such as 0.1,1, got {text}")
    return numbers
