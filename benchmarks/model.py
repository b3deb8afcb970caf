"""Compares our models with timm's: speed, memory, compilation, ConViT and DeiT, resolutions.

    python -m benchmarks.model --peer timm
    python -m benchmarks.model --parts speed --variants convit_base --batch 4 --no-memory
    python -m benchmarks.model --parts speed --options --options positional=contract unroll=12
    python -m benchmarks.model --parts scaling --image_size 224 512 1024

All times are measured in one process, the contenders in turn. A ratio is taken within each
repetition; the median is printed, with the quartiles in brackets. Each peak memory is measured in a
process of its own. benchmarks.memory says what it counts, and benchmarks.contenders what a step is.

    speed     forward pass and training step, ours and timm's, for each variant, batch and image
              size. MFU is printed if the device's peak is known, and counts matrix products
              (convit_jax.model.flops). "compile" is the time of tracing and compiling in seconds.
    deit      speed of ConViT over that of DeiT with the same heads and width, ours and timm's
    scaling   forward passes over resolutions, drawn as a picture with its data as JSON beside it
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from benchmarks import command, contenders, machine, memory, scaling, timing
from benchmarks.contenders import COMPILED, DEIT, FORWARD, TIMM, Contender, Spec
from convit_jax.model import chips, flops


def _ready(specs: dict[Any, Spec]) -> dict[Any, Contender]:
    """Makes the contenders that can run here and runs them once; prints why others cannot."""
    made = {key: contenders.attempt(contenders.warmed, spec) for key, spec in specs.items()}
    for key, result in made.items():
        if isinstance(result, str):
            print(f"left out, {key}: {result}", flush=True)
    return {key: result for key, result in made.items() if isinstance(result, Contender)}


def _memory(flags: argparse.Namespace, spec: Spec) -> memory.Memory | None:
    found = memory.in_fresh_process(spec) if flags.memory else None
    if isinstance(found, str):
        print(f"no memory of {spec.who}: {found}")
        return None
    return found


def _gigabytes(number: int | None) -> str:
    return f"{'' if number is None else f'{number / 1e9:.3f}':>9}"


def _against(who: str, times: dict[str, np.ndarray]) -> str:
    """Returns the speed of a contender over that of each peer, for the columns of `_header`."""
    peers = [name for name in (TIMM, COMPILED) if name in times and name != who]
    return "".join(f"{timing.speed_ratio(times[who], times[name]):>26}" for name in peers)


def _label(flags: argparse.Namespace, text: str = "") -> str:
    """Returns the column that says what and who, as wide as our longest set of options needs."""
    forms = [" ".join(f"{k}={v}," for k, v in form) for form in flags.options]
    return f"{text:<{24 + max(map(len, forms))}}"


def _header(flags: argparse.Namespace, middle: str) -> str:
    peers = [] if flags.peer == "none" else [TIMM, COMPILED] if flags.torch_compile else [TIMM]
    return middle + "".join(f"{'/ ' + name:>26}" for name in peers)


def speed(flags: argparse.Namespace) -> None:
    """Prints a row for each case, kind of work and contender."""
    columns = f"{'ms':>9}{'images/s':>10}{'MFU':>7}{'compile':>9}{'peak GB':>9}{'plan GB':>9}"
    print(_header(flags, f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(flags)}{columns}"))
    for case in command.cases(flags):
        for what in flags.work:
            specs = command.specs(flags, case, what)
            ready = _ready(specs)
            times = timing.measure({who: c.run for who, c in ready.items()}, flags.repetitions)
            compiled = {who: c.compile_seconds for who, c in ready.items()}
            del ready  # frees its memory
            for who, seconds in times.items():
                held = _memory(flags, specs[who])
                median = np.median(seconds)
                count = flops.forward_flops(specs[who].model) * (1 if what == FORWARD else 3)
                peak = chips.peak_flops(jax.devices()[0], flags.dtype)
                share = case.batch / median * count / peak / jax.device_count() if peak else None
                line = f"{case}  {_label(flags, f'{what}, {who}')}{median * 1e3:>9.1f}"
                line += f"{case.batch / median:>10.2f}{'' if share is None else f'{share:.1%}':>7}"
                took = compiled[who]
                line += f"{'' if took is None else f'{took:.1f}':>9}"
                line += _gigabytes(held and held.peak) + _gigabytes(held and held.planned)
                print(line + _against(who, times), flush=True)


def deit(flags: argparse.Namespace) -> None:
    """Prints the speed of ConViT over that of DeiT with the same heads and width."""
    columns = f"{'ConViT/s':>10}{'DeiT/s':>10}{'ConViT / DeiT':>26}"
    print(f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(flags)}{columns}")
    for case in command.cases(flags):
        for what in flags.work:
            convits = command.specs(flags, case, what)
            deits = command.specs(flags, case, what, **DEIT)
            specs = {("ConViT", who): spec for who, spec in convits.items()}
            specs |= {("DeiT", who): spec for who, spec in deits.items()}
            ready = _ready(specs)
            times = timing.measure({key: c.run for key, c in ready.items()}, flags.repetitions)
            del ready
            for who in convits:
                pair = [times.get((family, who)) for family in ("ConViT", "DeiT")]
                if any(seconds is None for seconds in pair):
                    continue
                rates = "".join(f"{case.batch / np.median(s):>10.2f}" for s in pair)
                ratio = timing.speed_ratio(*pair)
                print(f"{case}  {_label(flags, f'{what}, {who}')}{rates}{ratio:>26}", flush=True)


def scale(flags: argparse.Namespace) -> None:
    """Prints forward passes over resolutions, adds them to the JSON file, and draws the picture."""
    columns = f"{'ms':>9}{'peak GB':>9}{'plan GB':>9}"
    print(_header(flags, f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(flags)}{columns}"))
    records = []
    for case in command.cases(flags):
        specs = command.specs(flags, case, FORWARD)
        ready = _ready(specs)
        times = timing.measure({who: c.run for who, c in ready.items()}, flags.repetitions)
        del ready
        for who, seconds in times.items():
            held = _memory(flags, specs[who])
            record = dataclasses.asdict(case) | {"who": who, "dtype": flags.dtype}
            record |= {"device": machine.device(), "date": time.strftime("%Y-%m-%d")}
            record |= {"seconds": np.percentile(seconds, [25, 50, 75]).round(5).tolist()}
            if held:
                record |= {"peak_bytes": held.peak, "planned_bytes": held.planned}
            records.append(record)
            line = f"{case}  {_label(flags, who)}{np.median(seconds) * 1e3:>9.1f}"
            line += _gigabytes(held and held.peak) + _gigabytes(held and held.planned)
            print(line + _against(who, times), flush=True)
    _print_growth(records)
    kept = scaling.merge(flags.picture.with_suffix(".json"), records)
    try:
        scaling.draw(scaling.like(records[0], kept), flags.picture)
    except ImportError:
        print("no picture: it needs matplotlib: pip install '.[benchmarks]'")
    else:
        print(f"wrote {flags.picture}")


def _print_growth(records: list[scaling.Record]) -> None:
    """Prints the growth of time and memory from each resolution to one of four times the pixels."""
    found = {(r["variant"], r["batch"], r["who"], *r["image_size"]): r for r in records}
    for (*subject, height, width), large in found.items():
        small = found.get((*subject, height / 2, width / 2))
        if small is None:
            continue
        growth = f"time x {large['seconds'][1] / small['seconds'][1]:.1f}"
        if small.get("peak_bytes", 0) > 0 and "peak_bytes" in large:
            growth += f", peak memory x {large['peak_bytes'] / small['peak_bytes']:.1f}"
        print(f"{subject[0]}, {subject[2]}: from {height // 2} to {height} pixels {growth}")


def main(arguments: list[str] | None = None) -> None:
    parts = command.parse(__doc__, arguments)
    flags = next(iter(parts.values()))
    machine.set_up()
    versions = machine.versions(flags.peer != "none")
    print(f"{time.strftime('%Y-%m-%d')}, {machine.device()}, {flags.dtype}, {versions}")
    for part, filled in parts.items():
        print(f"\n{part}")
        {"speed": speed, "deit": deit, "scaling": scale}[part](filled)


if __name__ == "__main__":
    main()
