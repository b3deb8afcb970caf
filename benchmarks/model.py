"""Our models beside timm's: speed, memory, compilation, ConViT against DeiT, and resolutions.

    python -m benchmarks.model --peer timm
    python -m benchmarks.model --parts speed --variants convit_base --batch 4 --no-memory
    python -m benchmarks.model --parts speed --options --options positional=contract unroll=12
    python -m benchmarks.model --parts scaling --image_size 224 512 1024

Every time is taken in one process, turn by turn, and ratios are those within a repetition: their
median, and quartiles in brackets. Peak memory is measured in a process of its own each; see
benchmarks.memory for what counts, and benchmarks.contenders for what a step is.

    speed     for each variant, batch and image size: forward pass and training step, ours and
              timm's. MFU, where the device's peak is known, counts matrix products
              (convit_jax.flops). "compile" is tracing and compiling in seconds.
    deit      the speed of ConViT over that of DeiT with the same heads and width, ours and timm's
    scaling   forward passes over resolutions, with a picture and its data as JSON beside it
"""

import argparse
import ast
from collections.abc import Iterator
import dataclasses
import os
import pathlib
import platform
import time
from typing import Any

import jax
import jaxlib
import numpy as np

from benchmarks import contenders, memory, peer, scaling, timing
from benchmarks.contenders import COMPILED, FORWARD, OURS, STEP, TIMM, WORK, Contender, Spec
from convit_jax import VARIANTS, flops

# (variants, batches, image sizes, repetitions) of a part, where the command does not say.
_DEFAULTS = {
    "speed": (["convit_tiny", "convit_small", "convit_base"], [8], [224], 15),
    "deit": (["convit_small_plus", "convit_base"], [8], [224], 15),
    "scaling": (["convit_small"], [1], [224, 384, 512, 768, 1024], 5),
}
# The DeiT that differs from a ConViT in nothing but its attention and class token.
_DEIT = {"local_up_to_layer": 0, "cls_pos_embed": True, "qkv_bias": True}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    def default(column: int) -> str:
        found = {part: row[column] for part, row in _DEFAULTS.items()}
        return "; ".join(f"{k}: {' '.join(map(str, np.atleast_1d(v)))}" for k, v in found.items())

    add("--parts", "(default: all)", nargs="+", choices=_DEFAULTS, default=list(_DEFAULTS))
    add("--peer", "whom to measure beside (default: timm)", choices=["timm", "none"],
        default="timm")  # fmt: skip
    add("--peer_only", "only the peer: on a GPU two frameworks keep what memory they once took",
        action="store_true")  # fmt: skip
    add("--torch_compile", "the peer under torch.compile as well, which needs minutes and a C++ "
        "compiler or Triton (default: on a GPU only)",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--variants", f"of {', '.join(VARIANTS)} (default: {default(0)})", nargs="+",
        choices=VARIANTS, metavar="NAME")  # fmt: skip
    add("--batch", f"images a pass (default: {default(1)})", type=int, nargs="+", metavar="N")
    add("--image_size", f"pixels, as 224 or 224x320 (default: {default(2)})", type=_image_size,
        nargs="+", metavar="N")  # fmt: skip
    add("--repetitions", f"(default: {default(3)})", type=int, metavar="N")
    add("--work", "of the speed and deit parts (default: forward step)", nargs="+", choices=WORK,
        default=[FORWARD, STEP])  # fmt: skip
    add("--options", "of create_model, for ours: attention=chunked depth=6; may be given several "
        "times, and nothing after it is the defaults. timm takes the sizes of the first.",
        nargs="*", action="append", type=_option, metavar="KEY=VALUE")  # fmt: skip
    add("--dtype", "of matrix products (default: float32)", choices=("float32", "bfloat16"),
        default="float32")  # fmt: skip
    add("--memory", "whether to measure peak memory (default: yes); about 15 s for each",
        action=argparse.BooleanOptionalAction, default=True)  # fmt: skip
    add("--picture", "of the scaling part; its data are kept beside it as .json, where runs with "
        "other resolutions or forms add to them (default: %(default)s)", type=pathlib.Path,
        default=scaling.PICTURE, metavar="PNG")  # fmt: skip
    return parser


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the command's product: what all contenders of a comparison have in common."""

    variant: str
    batch: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{self.variant:<18}{self.batch:>6}{size:>9}"


def _cases(args: argparse.Namespace, part: str) -> Iterator[Case]:
    variants, batches, sizes, _ = _DEFAULTS[part]
    for variant in args.variants or variants:
        for batch in args.batch or batches:
            for size in args.image_size or sizes:
                yield Case(variant, batch, size if isinstance(size, tuple) else (size, size))


def _specs(args: argparse.Namespace, case: Case, what: str, **extra: Any) -> dict[str, Spec]:
    """who -> what they are to do; ours by the options that tell them apart."""
    size = {"image_size": case.image_size}
    forms = [dict(form) for form in args.options or [[]]]
    peers = [] if args.peer == "none" or what == contenders.WHOLE_STEP else [TIMM]
    specs = {}
    for who in [*peers, *([COMPILED] if peers and args.torch_compile else [])]:
        options = forms[0] | size | extra
        specs[who] = Spec(who, what, case.variant, options, case.batch, args.dtype)
    for form in [] if args.peer_only else forms:
        name = ", ".join([OURS, *(f"{key}={value}" for key, value in form.items())])
        options = form | size | extra
        specs[name] = Spec(OURS, what, case.variant, options, case.batch, args.dtype)
    return specs


def _ready(specs: dict[Any, Spec]) -> dict[Any, Contender]:
    """Those that can run here, run once; says why the others cannot."""
    made = {key: contenders.attempt(contenders.warmed, spec) for key, spec in specs.items()}
    for key, result in made.items():
        if isinstance(result, str):
            print(f"left out, {key}: {result}", flush=True)
    return {key: result for key, result in made.items() if isinstance(result, Contender)}


def _memory(args: argparse.Namespace, spec: Spec) -> memory.Memory | None:
    found = memory.in_fresh_process(spec) if args.memory else None
    if isinstance(found, str):
        print(f"no memory of {spec.who}: {found}")
        return None
    return found


def _gigabytes(number: int | None) -> str:
    return f"{'' if number is None else f'{number / 1e9:.3f}':>9}"


def _against(who: str, times: dict[str, np.ndarray]) -> str:
    """The speed of a contender over that of each peer, for the columns of `_header`."""
    peers = [name for name in (TIMM, COMPILED) if name in times and name != who]
    return "".join(f"{timing.speed_ratio(times[who], times[name]):>26}" for name in peers)


def _label(args: argparse.Namespace, text: str = "") -> str:
    """The column that says what and who, as wide as the longest form of ours needs."""
    forms = [" ".join(f"{k}={v}," for k, v in form) for form in args.options or [[]]]
    return f"{text:<{24 + max(map(len, forms))}}"


def _header(args: argparse.Namespace, middle: str) -> str:
    peers = [] if args.peer == "none" else [TIMM, COMPILED] if args.torch_compile else [TIMM]
    return middle + "".join(f"{'/ ' + name:>26}" for name in peers)


def speed(args: argparse.Namespace) -> None:
    """Prints a row for each case, kind of work and contender."""
    columns = f"{'ms':>9}{'images/s':>10}{'MFU':>7}{'compile':>9}{'peak GB':>9}{'plan GB':>9}"
    print(_header(args, f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(args)}{columns}"))
    repetitions = args.repetitions or _DEFAULTS["speed"][3]
    for case in _cases(args, "speed"):
        for what in args.work:
            specs = _specs(args, case, what)
            ready = _ready(specs)
            times = timing.measure({who: c.run for who, c in ready.items()}, repetitions)
            compiled = {who: c.compile_seconds for who, c in ready.items()}
            del ready  # its memory
            for who, seconds in times.items():
                held = _memory(args, specs[who])
                median = np.median(seconds)
                count = flops.forward_flops(specs[who].model) * (1 if what == FORWARD else 3)
                peak = flops.peak_flops(jax.devices()[0], args.dtype)
                share = case.batch / median * count / peak / jax.device_count() if peak else None
                line = f"{case}  {_label(args, f'{what}, {who}')}{median * 1e3:>9.1f}"
                line += f"{case.batch / median:>10.2f}{'' if share is None else f'{share:.1%}':>7}"
                took = compiled[who]
                line += f"{'' if took is None else f'{took:.1f}':>9}"
                line += _gigabytes(held and held.peak) + _gigabytes(held and held.planned)
                print(line + _against(who, times), flush=True)


def deit(args: argparse.Namespace) -> None:
    """Prints the speed of ConViT over that of DeiT at equal heads and width."""
    columns = f"{'ConViT/s':>10}{'DeiT/s':>10}{'ConViT / DeiT':>26}"
    print(f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(args)}{columns}")
    repetitions = args.repetitions or _DEFAULTS["deit"][3]
    for case in _cases(args, "deit"):
        for what in args.work:
            specs = {("ConViT", who): spec for who, spec in _specs(args, case, what).items()}
            others = _specs(args, case, what, **_DEIT)
            specs |= {("DeiT", who): spec for who, spec in others.items()}
            ready = _ready(specs)
            times = timing.measure({key: c.run for key, c in ready.items()}, repetitions)
            del ready
            for who in others:
                pair = [times.get((family, who)) for family in ("ConViT", "DeiT")]
                if any(seconds is None for seconds in pair):
                    continue
                rates = "".join(f"{case.batch / np.median(s):>10.2f}" for s in pair)
                ratio = timing.speed_ratio(*pair)
                print(f"{case}  {_label(args, f'{what}, {who}')}{rates}{ratio:>26}", flush=True)


def scale(args: argparse.Namespace) -> None:
    """Prints forward passes over resolutions, adds them to the JSON, and draws the picture."""
    columns = f"{'ms':>9}{'peak GB':>9}{'plan GB':>9}"
    print(_header(args, f"{'variant':<18}{'batch':>6}{'pixels':>9}  {_label(args)}{columns}"))
    records = []
    repetitions = args.repetitions or _DEFAULTS["scaling"][3]
    for case in _cases(args, "scaling"):
        specs = _specs(args, case, FORWARD)
        ready = _ready(specs)
        times = timing.measure({who: c.run for who, c in ready.items()}, repetitions)
        del ready
        for who, seconds in times.items():
            held = _memory(args, specs[who])
            record = dataclasses.asdict(case) | {"who": who, "dtype": args.dtype}
            record |= {"device": _device(), "date": time.strftime("%Y-%m-%d")}
            record |= {"seconds": np.percentile(seconds, [25, 50, 75]).round(5).tolist()}
            if held:
                record |= {"peak_bytes": held.peak, "planned_bytes": held.planned}
            records.append(record)
            line = f"{case}  {_label(args, who)}{np.median(seconds) * 1e3:>9.1f}"
            line += _gigabytes(held and held.peak) + _gigabytes(held and held.planned)
            print(line + _against(who, times), flush=True)
    _print_growth(records)
    kept = scaling.merge(args.picture.with_suffix(".json"), records)
    try:
        scaling.draw(kept, args.picture)
    except ImportError:
        print("no picture: it needs matplotlib: pip install '.[benchmarks]'")
    else:
        print(f"wrote {args.picture}")


def _print_growth(records: list[scaling.Record]) -> None:
    """Of time and memory, from each resolution to that of four times the pixels."""
    found = {(r["variant"], r["batch"], r["who"], *r["image_size"]): r for r in records}
    for (*subject, height, width), large in found.items():
        small = found.get((*subject, height // 2, width // 2))
        if small is None:
            continue
        growth = f"time x {large['seconds'][1] / small['seconds'][1]:.1f}"
        if small.get("peak_bytes", 0) > 0 and "peak_bytes" in large:
            growth += f", peak memory x {large['peak_bytes'] / small['peak_bytes']:.1f}"
        print(f"{subject[0]}, {subject[2]}: from {height // 2} to {height} pixels {growth}")


def _device() -> str:
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(": ", 1)[1] if names else platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    # Otherwise three quarters of a GPU's memory are JAX's from the start, and a program that was
    # compiled before would seem to compile in no time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)
    # torch.compile would leave worker processes behind, which start up beside what is timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    if args.peer != "none":
        timm, torch = peer.import_timm()
        versions += f", timm {timm.__version__}, torch {torch.__version__}"
        if args.torch_compile is None:
            args.torch_compile = torch.cuda.is_available()
    for part in args.parts:
        try:
            for case in _cases(args, part):
                for spec in _specs(args, case, FORWARD).values():
                    _ = spec.model
        except ValueError as error:
            parser.error(str(error))
    print(f"{time.strftime('%Y-%m-%d')}, {_device()}, {args.dtype}, {versions}")
    for part in args.parts:
        print(f"\n{part}")
        {"speed": speed, "deit": deit, "scaling": scale}[part](args)


if __name__ == "__main__":
    main()
