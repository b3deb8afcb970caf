"""The flags of benchmarks.model, and the list of comparisons that they ask for."""

import argparse
import ast
from collections.abc import Iterator
import dataclasses
import itertools
import pathlib
from typing import Any

from benchmarks import contenders, scaling
from benchmarks.contenders import COMPILED, FORWARD, OURS, STEP, TIMM, WORK, Spec
from convit_jax import VARIANTS

# Defaults of the flags, which depend on the part.
_SPEED = {
    "variants": ["convit_tiny", "convit_small", "convit_base"],
    "batch": [8],
    "image_size": [(224, 224)],
    "repetitions": 15,
    "options": [[]],
}
_DEIT = _SPEED | {"variants": ["convit_small_plus", "convit_base"]}
_SCALING = {
    "variants": ["convit_small"],
    "batch": [1],
    "image_size": [(side, side) for side in (224, 384, 512, 768, 1024)],
    "repetitions": 5,
    "options": [[], [("positional", "contract")]],
}
_PARTS = {"speed": _SPEED, "deit": _DEIT, "scaling": _SCALING}


def parse(description: str, arguments: list[str] | None = None) -> dict[str, argparse.Namespace]:
    """Returns {part: its flags, with its defaults}; exits with a message if a flag is wrong."""
    parser = _parser(description)
    args = parser.parse_args(arguments)
    given = {key: value for key, value in vars(args).items() if value is not None}
    filled = {part: argparse.Namespace(**_PARTS[part] | given) for part in args.parts}
    try:
        for flags in filled.values():
            for case in cases(flags):
                for spec in specs(flags, case, FORWARD).values():
                    _ = spec.model
    except ValueError as error:
        parser.error(str(error))
    return filled


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    add("--parts", "parts to run (default: all)", nargs="+", choices=_PARTS, default=list(_PARTS))
    add("--peer", "whose models to measure beside ours (default: timm)", choices=["timm", "none"],
        default="timm")  # fmt: skip
    add("--peer_only", "measure the peer alone; on a GPU, two frameworks in one process keep each "
        "other's memory", action="store_true")  # fmt: skip
    add("--torch_compile", "also measure the peer under torch.compile, which takes minutes and "
        "needs a C++ compiler or Triton (default: no)", action="store_true")  # fmt: skip
    add("--variants", f"models to measure, of {', '.join(VARIANTS)} (default: speed: tiny, small "
        "and base; deit: small_plus and base; scaling: small)", nargs="+", choices=VARIANTS,
        metavar="NAME")  # fmt: skip
    add("--batch", "images of a pass (default: 8; scaling: 1)", type=int, nargs="+", metavar="N")
    add("--image_size", "image size in pixels, such as 224 or 224x320 (default: 224; scaling: "
        "224 384 512 768 1024)", type=_image_size, nargs="+", metavar="N")  # fmt: skip
    add("--repetitions", "measurements of each time (default: 15; scaling: 5)", type=int,
        metavar="N")  # fmt: skip
    add("--work", "kinds of work in the parts speed and deit (default: forward step)", nargs="+",
        choices=WORK, default=[FORWARD, STEP])  # fmt: skip
    add("--options", "options of create_model for our models, such as positional=contract "
        "unroll=12. Repeat the flag to compare several sets of options; without a value it stands "
        "for the model's defaults. timm takes the sizes from the first set. (default: the model's "
        "defaults; scaling: also positional=contract)",
        nargs="*", action="append", type=option, metavar="KEY=VALUE")  # fmt: skip
    add("--dtype", "type of matrix products (default: float32)", choices=("float32", "bfloat16"),
        default="float32")  # fmt: skip
    add("--memory", "measure peak memory (default: yes); takes about 15 s a measurement on a CPU",
        action=argparse.BooleanOptionalAction, default=True)  # fmt: skip
    add("--picture", "picture of the part scaling. Its data are kept beside it as .json, and runs "
        "with other resolutions or options add to them (default: benchmarks/scaling.png)",
        type=pathlib.Path, default=scaling.PICTURE, metavar="PNG")  # fmt: skip
    return parser


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contenders of a comparison have in common: variant, batch size and image size."""

    variant: str
    batch: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{self.variant:<18}{self.batch:>6}{size:>9}"


def cases(flags: argparse.Namespace) -> Iterator[Case]:
    """Returns every variant at every batch and image size."""
    return itertools.starmap(Case, itertools.product(flags.variants, flags.batch, flags.image_size))


def specs(flags: argparse.Namespace, case: Case, what: str, **extra: Any) -> dict[str, Spec]:
    """Returns {contender: its spec}; our contenders are named by their options."""
    size = {"image_size": case.image_size}
    forms = [dict(form) for form in flags.options]
    peers = [] if flags.peer == "none" or what == contenders.WHOLE_STEP else [TIMM]
    specs = {}
    for who in [*peers, *([COMPILED] if peers and flags.torch_compile else [])]:
        options = forms[0] | size | extra
        specs[who] = Spec(who, what, case.variant, options, case.batch, flags.dtype)
    for form in [] if flags.peer_only else forms:
        name = ", ".join([OURS, *(f"{key}={value}" for key, value in form.items())])
        options = form | size | extra
        specs[name] = Spec(OURS, what, case.variant, options, case.batch, flags.dtype)
    return specs
