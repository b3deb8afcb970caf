"""Says what training costs on a TPU pod that is not there: memory, traffic, the least time.

    convit plan --config=convit_b --topology=v5e:4x4
    convit plan --config=convit_b --topology=v4:2x2x8 --config.mesh.fsdp=8 --json=plan.json
    convit plan --config=convit_b --topology=v5e:2x2 --try
    convit plan --config=digits --backend=cpu

The TPU's own compiler compiles the whole training step at its real size, for some minutes:
pip install -e '.[tpu-compiler]'. The command prints whether the step fits the memory of a chip,
what it computes, moves and sends, and the least time that the peaks of the chip allow: a bound and
no forecast. --backend plans for the devices of this machine.

The exit status is 1 if the step does not fit in any form that was compiled, or if the devices send
anything but gradients, parameters and scalars."""

import argparse
from collections.abc import Sequence
import importlib.metadata
import logging
import math

import jax
import ml_collections

from convit_jax import saved_config
from convit_jax.cli import options
from convit_jax.plan import attempts, chips, report, settle, topology
from convit_jax.storage import write_text
from convit_jax.train import setup
from convit_jax.train import teacher as teachers

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = "convit plan") -> int:
    """Parses the flags, compiles and prints the plan; returns the exit status."""
    parser = options.make_parser(prog, __doc__ or "")
    options.add_config(parser)
    _add_flags(parser)
    args, overrides = options.parse(parser, argv)
    if args.config is None:
        parser.error("--config: expected one")
    options.start_logging()
    with options.report(ValueError, OSError, RuntimeError, ModuleNotFoundError):
        return _plan(args, options.configuration(args.config, overrides))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True).add_argument
    where(
        "--topology",
        metavar="POD",
        help="TPU pod to compile for: GENERATION:CHIPS along each axis, such as v5e:4x4, v5p:2x2x2",
    )
    where(
        "--backend",
        choices=("cpu", "gpu"),
        help="compile for the devices of this machine, cpu or gpu",
    )
    add = parser.add_argument
    add(
        "--try",
        dest="attempts",
        nargs="?",
        const=attempts.KEYS,
        default=(),
        type=_attempts,
        metavar="KEYS",
        help="also compile forms that need less memory, one after another, of remat (mlp, block), "
        "fsdp (all devices) and accum_steps (2, 4, 8, until one fits); without KEYS all three",
    )
    add("--json", type=options.path, metavar="FILE", help="write the plan as JSON too")
    add(
        "--images",
        type=options.positive,
        metavar="N",
        help="number of training images, for the hours; default: ImageNet's if the data are",
    )
    add(
        "--chips_per_host",
        type=options.positive,
        metavar="N",
        help="chips of a host; default: what the compiler says, which is 4 for a TPU pod",
    )
    add(
        "--peak_tflops",
        type=_positive_number,
        metavar="X",
        help="peak of a device in TFLOP/s, in place of the table's",
    )
    add(
        "--bandwidth",
        type=_positive_number,
        metavar="X",
        help="bandwidth of a device's memory in GB/s, in place of the table's",
    )
    add(
        "--interconnect",
        type=_positive_number,
        metavar="X",
        help="bandwidth from a device to others in GB/s each way, in place of the table's; a "
        "device that the table does not have needs --peak_tflops and --bandwidth too",
    )


def _plan(args: argparse.Namespace, config: ml_collections.ConfigDict) -> int:
    devices, backend = _devices(args)
    config = config.copy_and_resolve_references()
    model = settle.settle(config, backend)
    teacher = teachers.read(config)
    chip = chips.find(devices[0], model.dtype, args.peak_tflops, args.bandwidth, args.interconnect)
    hosts = topology.hosts(devices, args.chips_per_host)
    images = args.images or settle.training_images(config)
    # The schedule of a run needs its length, but what a step costs does not depend on it.
    schedule = setup.number_of_steps(config, images or settle.IMAGENET_IMAGES)
    place = report.Place(
        name=args.topology or backend,
        chip=chip,
        devices=len(devices),
        hosts=hosts,
        versions=_versions(backend),
        epochs=config.train.epochs * config.data.epochs_scale,
        steps=schedule[1] if images else None,
    )
    steps = []
    for step in attempts.compile_each(
        config, model, devices, args.attempts, schedule, chip.memory, teacher
    ):
        log.info("%s", report.line(place, step))
        steps.append(step)
    print(report.text(place, settle.describe(config, model), steps))
    if args.json:
        write_text(args.json, report.to_json(place, saved_config.to_json(config), steps))
        log.info("wrote %s", args.json)
    fits = any(step.fits(chip.memory) is not False for step in steps)
    return 0 if fits and not any(step.unexpected for step in steps) else 1


def _devices(args: argparse.Namespace) -> tuple[list[jax.Device], str]:
    """Returns the devices to compile for, and the name of their backend."""
    if args.topology:
        topology.use_compiler_alone()
        return topology.devices(args.topology), "tpu"
    if args.backend == "cpu":  # so that nothing looks for a GPU or a TPU
        jax.config.update("jax_platforms", "cpu")
    return jax.devices(args.backend), args.backend


def _versions(backend: str) -> str:
    text = f"jax {jax.__version__}"
    return f"{text}, libtpu {importlib.metadata.version('libtpu')}" if backend == "tpu" else text


def _attempts(text: str) -> tuple[str, ...]:
    """Parses the value of --try: keys of `attempts.KEYS`, separated by commas."""
    keys = tuple(text.split(","))
    if unknown := set(keys) - set(attempts.KEYS):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(attempts.KEYS)}, got {','.join(sorted(unknown))}"
        )
    return keys


def _positive_number(text: str) -> float:
    """Parses the value of a flag: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number
