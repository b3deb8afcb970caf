"""The flags of benchmarks.model, and what they ask to be compared."""

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

# What a part takes where the command does not say.
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
    """The flags of each part that was asked for, with its defaults; exits if they are wrong."""
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

    add("--parts", "(default: all)", nargs="+", choices=_PARTS, default=list(_PARTS))
    add("--peer", "whom to measure beside (default: timm)", choices=["timm", "none"],
        default="timm")  # fmt: skip
    add("--peer_only", "only the peer: on a GPU two frameworks keep what memory they once took",
        action="store_true")  # fmt: skip
    add("--torch_compile", "the peer under torch.compile as well, which needs minutes and a C++ "
        "compiler or Triton (default: no)", action="store_true")  # fmt: skip
    add("--variants", f"of {', '.join(VARIANTS)} (default: speed: tiny, small and base; deit: "
        "small_plus and base; scaling: small)", nargs="+", choices=VARIANTS,
        metavar="NAME")  # fmt: skip
    add("--batch", "images a pass (default: 8; scaling: 1)", type=int, nargs="+", metavar="N")
    add("--image_size", "pixels, as 224 or 224x320 (default: 224; scaling: 224 384 512 768 1024)",
        type=_image_size, nargs="+", metavar="N")  # fmt: skip
    add("--repetitions", "(default: 15; scaling: 5)", type=int, metavar="N")
    add("--work", "of the parts speed and deit (default: forward step)", nargs="+", choices=WORK,
        default=[FORWARD, STEP])  # fmt: skip
    add("--options", "of create_model, for ours, as positional=contract unroll=12; may be given "
        "several times, and alone stands for the model's defaults. timm takes the sizes of the "
        "first. (default: those; scaling: also positional=contract)",
        nargs="*", action="append", type=_option, metavar="KEY=VALUE")  # fmt: skip
    add("--dtype", "of matrix products (default: float32)", choices=("float32", "bfloat16"),
        default="float32")  # fmt: skip
    add("--memory", "whether to measure peak memory (default: yes), about 15 s for each on a CPU",
        action=argparse.BooleanOptionalAction, default=True)  # fmt: skip
    add("--picture", "of the part scaling; its data are kept beside it as .json, where runs with "
        "other resolutions or forms add to them (default: benchmarks/scaling.png)",
        type=pathlib.Path, default=scaling.PICTURE, metavar="PNG")  # fmt: skip
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


def cases(flags: argparse.Namespace) -> Iterator[Case]:
    """Every variant at every batch and image size."""
    return itertools.starmap(Case, itertools.product(flags.variants, flags.batch, flags.image_size))


def specs(flags: argparse.Namespace, case: Case, what: str, **extra: Any) -> dict[str, Spec]:
    """who -> what they are to do; ours by the options that tell them apart."""
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
