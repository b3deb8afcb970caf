"""Measures ConViT and DeiT on this machine's accelerator and prints a Markdown table.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --minutes 5 --jobs 4
    python -m benchmarks.accelerator --variants convit_base --work step --options remat=none
    python -m benchmarks.accelerator --quick

The rows that tell most come first (benchmarks/accelerator_plan.py). Each is printed when it is
measured, and the JSON file is written again after each, so that a run that is stopped loses
nothing. A row that fails, for lack of memory or of a kernel, says why, and the table goes on. timm
is measured beside ours if it is installed and torch runs on the same kind of device.

    batch      images of a device; a pass computes those of all devices
    ms         median time of a pass. benchmarks.contenders says what a forward pass and a step are.
    MFU        share of the device's peak that the model's matrix products use at this speed
               (convit_jax.model.flops); empty if the peak is not known. All forms of a model count
               the products of its default form.
    GB         memory of a pass beside the parameters, the optimiser's state and the batch: the
               compiler's plan for ours, the peak of torch's allocations on a GPU for timm
    compile    seconds for tracing and compiling; with --jobs above 1, programs compile side by side
    / ours     speed over that of our ConViT with its defaults
    / timm     speed over that of timm's model of the same architecture, eager

Contenders take turns, and a ratio is taken within each turn; the median is printed, with the
quartiles in brackets.
"""

import argparse
from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import accelerator_plan as plan
from benchmarks import command, contenders, machine, memory, peer, timing
from benchmarks.accelerator_plan import Row
from benchmarks.contenders import COMPILED, OURS, TIMM, Contender
from convit_jax import storage
from convit_jax.model import chips, flops

_HEADER = (
    "| model | | work | batch | ms | images/s | MFU | GB | compile | / ours | / timm |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
_LATE = "no time left"


class Table:
    """Measures rows, prints them and keeps them in a JSON file.

    Args:
      flags: the flags of the command.
      about: what the JSON file says about the run as a whole.
    """

    def __init__(self, flags: argparse.Namespace, about: dict[str, Any]):
        self._flags, self._about = flags, about
        self._sizes = plan.QUICK if flags.quick else {}
        self._end = time.monotonic() + 60 * flags.minutes
        # Contenders that others are compared with; they are kept for later stages.
        self._references: dict[Row, Contender] = {}
        self.records: list[dict[str, Any]] = []
        self.late = 0

    def measure(self, rows: list[Row]) -> None:
        """Compiles the programs of a stage, and measures and prints its rows."""
        ours = [row for row in rows if row.who == OURS]
        with futures.ThreadPoolExecutor(self._flags.jobs) as pool:
            made = dict(zip(ours, pool.map(self._make, ours), strict=True))
        for row in rows:
            contender = made.pop(row, None) or self._make(row)
            if contender == _LATE:
                self.late += 1
                continue
            found = contender
            if isinstance(contender, Contender):
                found = _attempt(functools.partial(self._time, row, contender))
                if isinstance(found, str):
                    self._drop_broken_references()
                elif row.who in (OURS, TIMM) and not row.form:
                    self._references[row] = contender
            self._keep(row, {"failed": found} if isinstance(found, str) else found)
            self._empty_torch()

    def _keep(self, row: Row, found: dict[str, Any]) -> None:
        """Prints a row and writes the JSON file again."""
        fields = {"form": dict(row.form), "dtype": self._flags.dtype}
        self.records.append(dataclasses.asdict(row) | fields | found)
        print(_line(row, found), flush=True)
        text = json.dumps(self._about | {"rows": self.records}, indent=1)
        storage.write_text(self._flags.output, text)

    def _make(self, row: Row) -> Contender | str:
        if time.monotonic() > self._end:
            return _LATE
        return _attempt(functools.partial(contenders.make, self._spec(row)))

    def _spec(self, row: Row) -> contenders.Spec:
        return row.spec(self._flags.dtype, self._sizes, jax.device_count())

    def _time(self, row: Row, contender: Contender) -> dict[str, Any]:
        """Times a contender in turn with the references; returns the fields of its record."""
        contender.run()  # the first pass of torch also chooses kernels and makes AdamW's state
        used = contender.planned_bytes
        if row.who != OURS and _on_gpu():
            contender.release()
            used = memory.torch_peak_bytes(contender)
        same = functools.partial(dataclasses.replace, row, form=plan.DEFAULT)
        references = {"ours": same(family=plan.CONVIT, who=OURS), "timm": same(who=TIMM)}
        runs = {n: self._references[r] for n, r in references.items() if r in self._references}
        runs["row"] = contender
        passes = {name: self._passes(c) for name, c in runs.items()}
        times = timing.measure(
            {name: functools.partial(c.run, passes[name]) for name, c in runs.items()},
            self._flags.repetitions,
        )
        seconds = {name: taken / passes[name] for name, taken in times.items()}
        own = seconds.pop("row")
        rate = row.batch * jax.device_count() / np.median(own)
        return {
            "seconds": _quartiles(own),
            "images_per_second": float(rate),
            "mfu": self._mfu(row, rate),
            "bytes": used,
            "compile_seconds": contender.compile_seconds,
            "speed_over": {name: _quartiles(taken / own) for name, taken in seconds.items()},
        }

    def _passes(self, contender: Contender) -> int:
        """Returns how many passes a turn has: as many as fill a fifth of a second."""
        contender.run()  # allocates again what `_empty_torch` gave back
        start = time.perf_counter()
        contender.run()
        turn = 0.0 if self._flags.quick else 0.2
        return max(1, math.ceil(turn / (time.perf_counter() - start)))

    def _mfu(self, row: Row, rate: float) -> float | None:
        peak = chips.peak_flops(jax.devices()[0], self._flags.dtype)
        if peak is None:
            return None
        model = self._spec(dataclasses.replace(row, form=plan.DEFAULT)).model
        count = flops.forward_flops if row.what == contenders.FORWARD else flops.training_flops
        return float(rate * count(model) / peak / jax.device_count())

    def _empty_torch(self) -> None:
        """Returns what torch keeps between passes to the GPU, because JAX cannot use it."""
        peers = [c for row, c in self._references.items() if row.who != OURS]
        for contender in peers:
            contender.release()
        if peers and _on_gpu():
            peer.import_timm()[1].cuda.empty_cache()

    def _drop_broken_references(self) -> None:
        """Drops the references that a failure has broken, such as a step that lost its state."""
        for row, contender in list(self._references.items()):
            if isinstance(_attempt(contender.run), str):
                del self._references[row]


def _attempt(work: Callable[[], Any]) -> Any:
    """Returns work(), or the reason why it failed."""
    try:
        return work()
    except Exception as error:  # whatever it is, the other rows are worth having
        return contenders.reason(error)


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _quartiles(numbers: np.ndarray) -> list[float]:
    return [float(x) for x in np.percentile(numbers, [25, 50, 75])]


def _line(row: Row, found: dict[str, Any]) -> str:
    """Returns a row of the Markdown table."""
    cells = [row.variant, str(row), row.what, str(row.batch)]
    if "failed" in found:
        reason = found["failed"].replace("|", "/")
        return f"| {' | '.join(cells)} | failed: {reason[:160]} | | | | | | |"

    def number(key: str, form: str, factor: float = 1.0) -> str:
        return "" if found[key] is None else format(found[key] * factor, form)

    cells += [f"{found['seconds'][1] * 1e3:.2f}", number("images_per_second", ",.0f")]
    cells += [number("mfu", ".1%"), number("bytes", ".2f", 1e-9), number("compile_seconds", ".1f")]
    for name in ("ours", "timm"):
        ratio = found["speed_over"].get(name)
        cells.append("{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio) if ratio else "")
    return f"| {' | '.join(cells)} |"


def _peers(flags: argparse.Namespace) -> tuple[str, ...]:
    """Returns whose models can be measured beside ours; prints why if none can."""
    if flags.peer == "none":
        return ()
    try:
        _, torch = peer.import_timm()
    except ImportError as error:
        print(f"Without timm: {error}\n")
        return ()
    backend = jax.default_backend()
    if backend != ("gpu" if torch.cuda.is_available() else "cpu"):
        print(f"Without timm: JAX runs on {backend}, and torch {torch.__version__} does not.\n")
        return ()
    if backend != "cpu" and jax.device_count() > 1:
        print("Without timm: it would use one device, and ours uses all.\n")
        return ()
    return (TIMM, COMPILED) if flags.torch_compile else (TIMM,)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    add("--minutes", "no row is begun after this time (default: all rows)", type=float,
        default=math.inf, metavar="M")  # fmt: skip
    add("--quick", "models so small that every machine runs them in seconds, to try the command",
        action="store_true")  # fmt: skip
    add("--variants", "models to measure (default: convit_small, convit_base and convit_tiny)",
        nargs="+", choices=plan.VARIANTS)  # fmt: skip
    add("--work", "kinds of work to measure (default: all)", nargs="+", choices=contenders.WORK)
    add("--batch", "images of a device (default: 64 to 512, as the plan says)", type=int,
        nargs="+", metavar="N")  # fmt: skip
    add("--options", "options of create_model for our ConViT, such as positional=contract "
        "unroll=12; they are measured beside the defaults, in place of the plan's. Repeat the flag "
        "for several sets; without a value it leaves only the defaults.",
        nargs="*", action="append", type=command.option, metavar="KEY=VALUE")  # fmt: skip
    add("--peer", "whose models to measure beside ours (default: timm, where it can run)",
        choices=["timm", "none"], default="timm")  # fmt: skip
    add("--torch_compile", "also measure timm under torch.compile (default: yes, but not with "
        "--quick)", action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--dtype", "type of matrix products (default: bfloat16)", choices=("float32", "bfloat16"),
        default="bfloat16")  # fmt: skip
    add("--repetitions", "turns of each row (default: 5)", type=int, default=5, metavar="N")
    add("--jobs", "programs to compile at a time (default: 1)", type=int, default=1, metavar="N")
    add("--output", "JSON file of the results (default: accelerator.json)", type=pathlib.Path,
        default=pathlib.Path("accelerator.json"), metavar="FILE")  # fmt: skip
    flags = parser.parse_args(arguments)
    if flags.torch_compile is None:
        flags.torch_compile = not flags.quick
    if flags.quick:
        flags.variants, flags.batch = flags.variants or ["convit_small"], flags.batch or [8]
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = _parse(arguments)
    machine.set_up(torch_threads=min(16, os.cpu_count() or 1))
    peers = _peers(flags)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "device": machine.device(),
        "platform": jax.devices()[0].client.platform_version.replace("\n", " "),
        "dtype": flags.dtype,
        "versions": machine.versions(bool(peers)),
    }
    forms = None if flags.options is None else [tuple(form) for form in flags.options if form]
    stages = list(plan.stages(flags.variants, flags.work, flags.batch, forms, (OURS, *peers)))
    if not stages:
        raise SystemExit("error: no row of the plan has this --variants and --work")
    print(", ".join(about.values()), "", *_HEADER, sep="\n", flush=True)
    table = Table(flags, about)
    for rows in stages:
        table.measure(rows)
    if table.records:
        print(f"\nwrote {flags.output}")
    if table.late:
        print(f"{table.late} of {sum(map(len, stages))} rows were not begun: no time left")


if __name__ == "__main__":
    main()
