"""The plan of a run, as text and as JSON."""

import dataclasses
import json
from typing import Any

from convit_jax.plan.attempts import AS_CONFIGURED
from convit_jax.plan.chips import Chip
from convit_jax.plan.compiled import Step
from convit_jax.plan.roofline import Bound, Feeding, Peaks, bound
from convit_jax.train.eval_report import columns

# Images a second that one core decodes and augments, JPEGs of 500 x 375 pixels. This is the slower
# of the two measurements in benchmarks/README.md, "Feeding".
CORE_RATE = 536

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how long a run trains.

    Attributes:
      name: name of the devices, such as "v5e:4x4".
      chip: what is known of a device.
      devices: number of devices.
      hosts: number of hosts.
      versions: the versions of the compiler.
      epochs: number of epochs.
      steps: number of steps of the run; None if the number of images is not known.
    """

    name: str
    chip: Chip
    devices: int
    hosts: int
    versions: str
    epochs: float
    steps: int | None

    def bound(self, step: Step) -> Bound | None:
        """Returns the bound of a step's time; None without peaks or without a compiled step."""
        if self.chip.peaks is None or step.memory is None:
            return None
        return bound(
            step.flops,
            step.bytes_moved,
            self.chip.peaks,
            images=step.images,
            devices=self.devices,
            bytes_sent=step.bytes_sent,
        )


def text(place: Place, model: str, steps: list[Step]) -> str:
    """Returns the plan of a run in lines.

    Args:
      place: the devices and the length of the run.
      model: the model and how it is computed, in one line.
      steps: the step as configured, and others that were tried.
    """
    step = steps[0]
    chip, peaks = place.chip, place.chip.peaks
    lines = [
        f"{place.name}: {place.devices} x {chip.kind}, {place.hosts} "
        f"{'hosts' if place.hosts > 1 else 'host'}; {place.versions}",
        f"{model}; {step.images:,} images a step, {step.images // step.devices:,} a device",
        "",
        *_memory(step, chip),
    ]
    if step.memory is not None:
        lines += ["", *_work(step), "", *_sent(step)]
    found = place.bound(step)
    if found is not None and peaks is not None:
        lines += ["", *_time(place, step, found), "", *_feeding(place, found)]
    elif step.memory is not None:
        lines += ["", f"no peaks are known of {chip.kind}: no bound of the time; --peak_tflops and "
                  "--bandwidth give them"]  # fmt: skip
    if len(steps) > 1:
        lines += ["", *_tried(place, steps)]
    return "\n".join(lines)


def _memory(step: Step, chip: Chip) -> list[str]:
    title = "memory of a device in MiB, as the compiler counts it"
    state = f"  the state, by its shapes: {_mib(step.state_bytes)}"
    if step.memory is None:
        return [title, state, f"  does not fit: {step.refusal}", *_advice(step)]
    memory = step.memory
    fits = step.fits(chip.memory)
    verdict = ""
    if chip.memory is not None:
        share = memory.total / chip.memory
        verdict = f"of {_mib(chip.memory)}, {share:.0%}: {'fits' if fits else 'does not fit'}"
    size = step.teacher_bytes
    teacher = f"the teacher, {_mib(size)}, and " if size else "and "
    rows = [
        ("arguments", memory.arguments, f"the state, {_mib(step.state_bytes)}, {teacher}the batch"),
        ("temporaries", memory.temporaries, "activations, gradients"),
        ("results", memory.results, "all but the new state, which takes the place of the old one"),
        ("program", memory.program, ""),
        ("total", memory.total, verdict),
    ]
    lines = [f"  {name:<12}{_mib(size):>9}  {what}".rstrip() for name, size, what in rows]
    return [title, *lines, *(_advice(step) if fits is False else [])]


def _advice(step: Step) -> list[str]:
    if step.name != AS_CONFIGURED:
        return []
    return ["  --try compiles it with remat=mlp, remat=block, a split state, and parts of a batch"]


def _work(step: Step) -> list[str]:
    count, gflop = step.arithmetic, _number(step.flops / 1e9)
    repeated = step.arithmetic.flops / step.model_flops
    lines = [
        "a step on a device: products counted in the traced step, memory in the compiled program",
        f"  matrix products   {gflop} GFLOP, {repeated:.2f} times what the model needs",
        f"  main memory       {_number(step.bytes_moved / 1e9)} GB read and written",
    ]
    if step.xla_bytes is not None:
        size = _number(step.xla_bytes / 1e9)
        lines.append(f"  XLA's own count   {size} GB: loops once, on-chip memory too")
    if count.kernels:
        kernels = count.kernels // step.devices
        lines.append(f"  kernels           {kernels}, whose products are what they state")
    lines += [
        f"  not counted: the arithmetic of {name} ({times} a step, over all devices)"
        for name, times in sorted(count.uncounted.items())
    ]
    return lines


def _sent(step: Step) -> list[str]:
    if not step.collectives:
        return ["sent to other devices in a step: nothing"]
    lines = ["sent to other devices in a step"]
    for kind in sorted({c.kind for c in step.collectives}):
        those = [c for c in step.collectives if c.kind == kind]
        amounts: dict[str, int] = {}
        for c in those:
            for array in c.arrays:
                amounts[array.dtype] = amounts.get(array.dtype, 0) + c.turns * array.bytes
        text = ", ".join(f"{_mib(n)} MiB {t}" for t, n in amounts.items() if n >= 2**16)
        lines.append(f"  {kind:<18}{sum(c.turns for c in those)} times, {text or 'scalars'}")
    if step.unexpected:
        lines += [
            f"  neither a gradient nor a parameter: {what}, from {source or 'unknown'}"
            for what, source in step.unexpected
        ]
    else:
        lines.append("  all of it gradients, parameters, and scalars of the metrics")
    return lines


def _time(place: Place, step: Step, found: Bound) -> list[str]:
    peaks = place.chip.peaks
    assert peaks is not None
    lines = [
        f"the least time, at peaks of {peaks.flops / 1e12:,.4g} TFLOP/s and "
        f"{peaks.bandwidth / 1e9:,.4g} GB/s",
        f"  matrix products {found.flops_seconds * 1e3:.3g} ms, memory "
        f"{found.bytes_seconds * 1e3:.3g} ms: at least {found.seconds * 1e3:.3g} ms a step",
        f"  at most {found.images_per_second:,.0f} images/s, "
        f"MFU {found.mfu(step.model_flops / step.devices, peaks):.0%}",
    ]
    if place.steps is None:
        lines.append("  hours: not known without the number of training images (--images)")
    else:
        lines.append(
            f"  at least {_number(found.hours(place.steps))} hours and "
            f"{_number(found.device_hours(place.steps))} device-hours for {place.epochs:g} epochs, "
            f"{place.steps:,} steps"
        )
    lines += _sending(step, found, peaks) if step.collectives else []
    return [*lines, "  not included: what devices wait for one another or for images, evaluations"]


def _sending(step: Step, found: Bound, peaks: Peaks) -> list[str]:
    if found.sent_seconds is None or peaks.interconnect is None:
        return ["  sending: no bandwidth between devices is known; --interconnect gives it"]
    return [
        f"  sending, apart from that: {_mib(step.bytes_sent)} MiB by each device, at least "
        f"{found.sent_seconds * 1e3:.3g} ms at {peaks.interconnect / 1e9:,.4g} GB/s each way",
        "  how much of it overlaps with the rest is not known",
    ]


def _feeding(place: Place, found: Bound) -> list[str]:
    need = Feeding.of(found.images_per_second, place.hosts, CORE_RATE)
    return [
        f"feeding that: {need.images_per_second:,.0f} images/s by each host, which is {need.cores} "
        f"cores at {CORE_RATE} images/s",
        "  the rate of one core of an AMD EPYC with JPEGs of 500 x 375 pixels "
        "(benchmarks/README.md)",
    ]


def line(place: Place, step: Step) -> str:
    """Returns a line about one form of the step, when it is compiled."""
    fits = _fits(place, step)
    size = step.refusal if step.memory is None else f"{_mib(step.memory.total)} MiB a device"
    return f"{step.name}: {size}{fits and ', ' + fits}; compiled in {step.seconds:.0f} s"


def _fits(place: Place, step: Step) -> str:
    return {True: "fits", False: "does not fit", None: ""}[step.fits(place.chip.memory)]


def _tried(place: Place, steps: list[Step]) -> list[str]:
    rows = [("tried", "MiB", "", "GFLOP", "GB", "least ms", "images/s", "compiled in")]
    for step in steps:
        memory, found = step.memory, place.bound(step)
        rows.append(
            (
                step.name,
                "" if memory is None else _mib(memory.total),
                _fits(place, step),
                f"{step.flops / 1e9:,.0f}",
                "" if memory is None else f"{step.bytes_moved / 1e9:.3g}",
                "" if found is None else f"{found.seconds * 1e3:.3g}",
                "" if found is None else f"{found.images_per_second:,.0f}",
                f"{step.seconds:.0f} s",
            )
        )
    return [columns(rows)]


def _number(value: float) -> str:
    """Returns a number with four significant digits, or with all digits before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _mib(size: float) -> str:
    return f"{size / _MIB:,.0f}"


def to_json(place: Place, config: dict[str, Any], steps: list[Step]) -> str:
    """Returns the plan as JSON; sizes in bytes, times in seconds, figures of one device.

    Args:
      place: the devices and the length of the run.
      config: the configuration.
      steps: the step as configured, and others that were tried.
    """
    return json.dumps(
        {
            "place": dataclasses.asdict(place),
            "core_images_per_second": CORE_RATE,
            "steps": [_step_json(place, step) for step in steps],
            "config": config,
        },
        indent=2,
    )


def _step_json(place: Place, step: Step) -> dict[str, Any]:
    memory, found = step.memory, place.bound(step)
    values: dict[str, Any] = {
        "name": step.name,
        "mesh": step.mesh,
        "images": step.images,
        "fits": step.fits(place.chip.memory),
        "refusal": step.refusal,
        "compile_seconds": step.seconds,
        "memory": None
        if memory is None
        else {**dataclasses.asdict(memory), "state": step.state_bytes, "total": memory.total},
        "flops": step.flops,
        "model_flops": step.model_flops / step.devices,
        "kernels": step.arithmetic.kernels // step.devices,
        "uncounted": dict(step.arithmetic.uncounted),
        "bytes_moved": step.bytes_moved if memory else None,
        "xla_bytes_accessed": step.xla_bytes,
        "bytes_sent": step.bytes_sent if memory else None,
        "collectives": [
            {"kind": c.kind, "bytes": c.bytes, "times": c.turns, "source": c.source}
            for c in step.collectives
        ],
        "unexpected": [list(pair) for pair in step.unexpected],
        "bound": None,
    }
    if found is not None:
        values["bound"] = {
            **dataclasses.asdict(found),
            "seconds": found.seconds,
            "limit": found.limit,
            "images_per_second": found.images_per_second,
            "hours": None if place.steps is None else found.hours(place.steps),
            "device_hours": None if place.steps is None else found.device_hours(place.steps),
            **{
                f"host_{key}": value
                for key, value in dataclasses.asdict(
                    Feeding.of(found.images_per_second, place.hosts, CORE_RATE)
                ).items()
            },
        }
    return values
