"""What benchmarks.accelerator measures, the most informative first."""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

from benchmarks.contenders import COMPILED, DEIT, FORWARD, OURS, STEP, TIMM, WHOLE_STEP, Spec

Form = tuple[tuple[str, Any], ...]  # options of create_model, as pairs

CONVIT, DEIT_LIKE = "ConViT", "DeiT"

DEFAULT: Form = ()
XLA: Form = (("attention", "xla"),)
CONTRACT: Form = (("attention", "xla"), ("positional", "contract"))
CHUNKED: Form = (("attention", "chunked"),)
NO_REMAT: Form = (("remat", "none"),)
BLOCK: Form = (("remat", "block"),)
UNROLLED: Form = (("unroll", True),)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a model in one form, run by ours or by timm.

    Attributes:
      family: CONVIT, or DEIT_LIKE: plain attention with the heads, width and depth of the variant.
      who: OURS, TIMM or COMPILED.
      what: one of `contenders.WORK`.
      variant: one of `convit_jax.VARIANTS`.
      batch: number of images of each device.
      form: options of create_model that differ from the defaults.
    """

    family: str
    who: str
    what: str
    variant: str
    batch: int
    form: Form = DEFAULT

    def __str__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.form)
        return f"{self.family}, {self.who}{options}"

    def spec(self, dtype: str, sizes: dict[str, Any], devices: int) -> Spec:
        """Describes the contender for a number of devices; `sizes` are options of all models."""
        family = DEIT if self.family == DEIT_LIKE else {}
        options = sizes | family | dict(self.form)
        return Spec(self.who, self.what, self.variant, options, self.batch * devices, dtype)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Rows that are compiled together: one kind of work on one variant at one batch size."""

    what: str
    variant: str
    batch: int
    contenders: tuple[tuple[str, str, Form], ...]

    def rows(self) -> list[Row]:
        return [
            Row(family, who, self.what, self.variant, self.batch, form)
            for family, who, form in self.contenders
        ]


def _ours(*forms: Form, family: str = CONVIT) -> tuple[tuple[str, str, Form], ...]:
    return tuple((family, OURS, form) for form in forms)


_PEERS = ((CONVIT, TIMM, DEFAULT), *_ours(DEFAULT))
_DEITS = ((DEIT_LIKE, TIMM, DEFAULT), *_ours(DEFAULT, family=DEIT_LIKE))
_COMPILED = ((CONVIT, COMPILED, DEFAULT), (DEIT_LIKE, COMPILED, DEFAULT))

# Batches of one device. DeiT trains with 256 on each of four GPUs (facebookresearch/deit, README).
STAGES = (
    Stage(STEP, "convit_small", 256, (*_PEERS, *_ours(XLA, CONTRACT, NO_REMAT, UNROLLED))),
    Stage(STEP, "convit_small", 256, _DEITS),
    Stage(FORWARD, "convit_small", 256, (*_PEERS, *_ours(XLA, CONTRACT), *_DEITS)),
    Stage(STEP, "convit_base", 128, (*_PEERS, *_ours(XLA, NO_REMAT), *_DEITS)),
    Stage(STEP, "convit_small", 256, _COMPILED[:1]),
    Stage(STEP, "convit_tiny", 256, (*_PEERS, *_ours(XLA, NO_REMAT), *_DEITS)),
    Stage(
        STEP,
        "convit_small",
        256,
        (*_ours(NO_REMAT + UNROLLED), *_ours(XLA, family=DEIT_LIKE)),
    ),
    Stage(FORWARD, "convit_base", 256, (*_PEERS, *_ours(XLA, CONTRACT), *_DEITS)),
    Stage(FORWARD, "convit_tiny", 256, (*_PEERS, *_ours(XLA, CONTRACT), *_DEITS)),
    Stage(STEP, "convit_small", 64, (*_PEERS, *_ours(NO_REMAT))),
    Stage(STEP, "convit_small", 512, (*_PEERS, *_ours(NO_REMAT))),
    Stage(WHOLE_STEP, "convit_small", 256, _ours(DEFAULT)),
    Stage(STEP, "convit_small", 256, _ours(BLOCK, CHUNKED)),
    Stage(FORWARD, "convit_small", 256, (*_COMPILED, *_ours(UNROLLED, CHUNKED))),
    Stage(STEP, "convit_base", 128, (*_COMPILED, *_ours(UNROLLED))),
    Stage(STEP, "convit_tiny", 256, (*_COMPILED, *_ours(UNROLLED))),
)

VARIANTS = tuple(dict.fromkeys(stage.variant for stage in STAGES))

# Sizes of the models of --quick, which every machine runs in seconds.
QUICK = {"depth": 2, "embed_dim": 36, "local_up_to_layer": 1, "image_size": 32, "num_classes": 10}


def stages(
    variants: list[str] | None = None,
    work: list[str] | None = None,
    batches: list[int] | None = None,
    forms: list[Form] | None = None,
    whos: tuple[str, ...] = (OURS, TIMM, COMPILED),
) -> Iterator[list[Row]]:
    """Yields the rows of each stage that are asked for; None asks for those of the plan.

    Args:
      variants: variants to measure.
      work: kinds of work to measure.
      batches: batch sizes, each in place of all of the plan's.
      forms: forms of our models besides the defaults.
      whos: whose models to measure.
    """
    seen: set[Row] = set()
    for stage in STAGES:
        for batch in batches or [stage.batch]:
            rows = dataclasses.replace(stage, batch=batch).rows()
            if forms is not None:
                rows = list(itertools.chain.from_iterable(_with_forms(row, forms) for row in rows))
            kept = [
                row
                for row in dict.fromkeys(rows)
                if row not in seen
                and row.who in whos
                and (variants is None or row.variant in variants)
                and (work is None or row.what in work)
            ]
            seen.update(kept)
            if kept:
                yield kept


def _with_forms(row: Row, forms: list[Form]) -> list[Row]:
    """Replaces the plan's forms of our ConViT by the given ones."""
    if row.form:
        return []
    if (row.family, row.who) != (CONVIT, OURS):
        return [row]
    return [row, *(dataclasses.replace(row, form=form) for form in forms)]
