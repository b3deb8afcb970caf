"""The studies of the paper, each as a table: what is trained for each row and column.

A run is named by what distinguishes it from the base configuration. Studies of one base
configuration share the runs that they have in common.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

from convit_jax import ablations, recipe, saved_config
from convit_jax.analysis import masking
from convit_jax.model import image_size
from convit_jax.model.variants import create_model, structure_of


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
      name: name of its workdir.
      flags: --config.KEY=VALUE flags that distinguish it from the base configuration.
      mask_first: numbers of GPSA layers to mask after training, counted from the input. None masks
        nothing; () masks the position embedding alone.
    """

    name: str
    flags: tuple[str, ...]
    mask_first: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a study's table: a run of each seed, whose results are averaged.

    Attributes:
      row: name of the row.
      column: name of the column.
      runs: a run for each seed, in the order of the seeds.
      masked: what is masked in their weights before they are evaluated, as `convit analyse masking`
        names it: the part, and the number of layers. None takes the accuracy of training.
    """

    row: str
    column: str
    runs: tuple[Run, ...]
    masked: tuple[str, int | None] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its table, and the runs behind it.

    Attributes:
      name: name of the study.
      title: what the table shows, in one line.
      corner: what its rows are, the head of the first column.
      across: what its columns are.
      cells: the cells, row by row.
    """

    name: str
    title: str
    corner: str
    across: str
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs in the order of training: one seed after another, so tables fill early."""
        by_seed = zip(*(cell.runs for cell in self.cells), strict=True)
        return tuple(dict.fromkeys(run for runs in by_seed for run in runs))


# Shares of the training images in Table 2 of the paper, and those for a set of a few thousand.
PAPER_SHARES = (0.05, 0.1, 0.3, 0.5, 1.0)
SMALL_SHARES = (0.01, 0.05, 0.1, 0.3, 1.0)

# The rows of Table 3, in words.
_ABLATIONS = {
    "a": "ConViT",
    "b": "gates frozen at 0",
    "c": "random initialisation",
    "d": "gates frozen at 0, random initialisation",
    "e": "DeiT",
    "f": "gates frozen at 0, positional attention frozen",
    "g": "gates frozen at 0, positional attention frozen, random initialisation",
}


def baseline(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the flags that turn a configuration of a ConViT into one of its DeiT.

    The DeiT of one of the paper's models is the paper's. Otherwise it has the heads, the width and
    the depth of the configuration.
    """
    model = config.model
    stated = (model.embed_dim, model.num_heads, model.depth, model.local_up_to_layer)
    if stated == (None, None, None, None):
        name = (model.name or recipe.DEFAULT_MODEL).replace("convit_", "deit_")
        return _as_flags({"model.name": name})
    return _as_flags(ablations.TABLE_3["e"])


def check_base(config: ml_collections.ConfigDict) -> None:
    """Checks that a study can be made of a configuration.

    Raises:
      ValueError: if it is of a DeiT, starts from weights, or sets what the study sets.
    """
    if not gpsa_layers(config):
        raise ValueError("--config: expected a ConViT, got a DeiT: each study makes its own DeiT")
    if config.init_from:
        raise ValueError(f"init_from: expected random weights for a study, got {config.init_from}")
    for name in ("seed", "data.sampling_ratio", "data.epochs_scale"):
        value = saved_config.values(config)[name]
        if value != recipe.KEYS[name].default:
            raise ValueError(f"{name}: set by the study (see --seeds and --shares), got {value}")


def check_run(config: ml_collections.ConfigDict) -> None:
    """Checks that the model of a run can be made, before the runs before it take hours.

    Args:
      config: the configuration of the run.

    Raises:
      ValueError: if its options do not fit together, or it freezes what its model does not have.
    """
    stated = {name: value for name, value in config.model.items() if value is not None}
    stated["image_size"] = image_size.parse(stated.get("image_size", 224), "model.image_size")
    model = create_model(stated.pop("name", recipe.DEFAULT_MODEL), **stated)
    frozen = {*config.optim.freeze.split(",")} & {"gates", "positional", "gpsa"}
    if frozen and not model.local_up_to_layer:
        raise ValueError(f"optim.freeze={config.optim.freeze}: a DeiT has no such parameters")


def sample_efficiency(
    config: ml_collections.ConfigDict, seeds: Sequence[int], shares: Sequence[float]
) -> Study:
    """Table 2: a ConViT and its DeiT, each trained on some of the images of every class.

    The epochs grow as the share falls, so that every run takes about as many steps.
    """
    return Study(
        "sample-efficiency",
        "Top-1 accuracy by the share of training images (Table 2 of the paper)",
        "model",
        "share of the training images",
        tuple(
            Cell(row, _percent(share), _runs(config, name, flags, share, seeds))
            for row, (name, flags) in _convit_and_deit(config).items()
            for share in shares
        ),
    )


def ablation_study(
    config: ml_collections.ConfigDict, seeds: Sequence[int], shares: Sequence[float]
) -> Study:
    """Table 3: a ConViT without some of its parts, trained on all and on some of the images.

    Row e is a DeiT with the heads, the width and the depth of the ConViT.
    """
    deit = _as_flags(ablations.TABLE_3["e"])
    names = {"a": "convit"} | ({"e": "deit"} if deit == baseline(config) else {})
    return Study(
        "ablations",
        "Top-1 accuracy of ablations (Table 3 of the paper)",
        "ablation",
        "share of the training images",
        tuple(
            Cell(
                f"{row}: {_ABLATIONS[row]}",
                _percent(share),
                _runs(config, names.get(row, f"ablation_{row}"), _as_flags(changes), share, seeds),
            )
            for row, changes in ablations.TABLE_3.items()
            for share in shares
        ),
    )


def locality(
    config: ml_collections.ConfigDict,
    seeds: Sequence[int],
    strengths: Sequence[float],
    layers: Sequence[int],
    share: float,
) -> Study:
    """Figure 8: locality strengths at initialisation, and numbers of GPSA layers."""
    cells = []
    for count in layers:
        for strength in strengths:
            flags = _as_flags(
                {"model.local_up_to_layer": count, "model.locality_strength": f"{strength:g}"}
            )
            name = f"gpsa_{count}-strength_{strength:g}"
            if (count, strength) == (gpsa_layers(config), config.model.locality_strength or 1.0):
                name, flags = "convit", ()
            cells.append(
                Cell(f"{count}", f"{strength:g}", _runs(config, name, flags, share, seeds))
            )
    return Study(
        "locality",
        "Top-1 accuracy by the number of GPSA layers and the locality strength (Figure 8)",
        "GPSA layers",
        "locality strength",
        tuple(cells),
    )


def masking_study(config: ml_collections.ConfigDict, seeds: Sequence[int]) -> Study:
    """Tables 5 and 6: a ConViT and its DeiT without position embedding, content or position."""
    first = masking.default_layers(gpsa_layers(config))
    cells = []
    for row, (name, flags) in _convit_and_deit(config).items():
        layers = first if row == "ConViT" else ()
        runs = _runs(config, name, flags, 1.0, seeds)
        runs = tuple(dataclasses.replace(run, mask_first=layers) for run in runs)
        columns: dict[str, tuple[str, int | None]] = {"nothing": ("nothing", None)}
        if config.model.use_pos_embed is not False:
            columns["position embedding"] = ("position embedding", None)
        columns |= {f"{part}, {n}": (part, n) for part in ("content", "position") for n in layers}
        cells += [Cell(row, column, runs, masked) for column, masked in columns.items()]
    return Study(
        "masking",
        "Top-1 accuracy with a part masked after training (Tables 5 and 6 of the paper)",
        "model",
        "what is masked, and in how many of the first GPSA layers",
        tuple(cells),
    )


def _convit_and_deit(
    config: ml_collections.ConfigDict,
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns {row: (name of its runs, flags)} of a ConViT and of its DeiT."""
    return {"ConViT": ("convit", ()), "DeiT": ("deit", baseline(config))}


def figure_8_layers(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Returns a third, two thirds and all of the GPSA layers of a configuration."""
    most = gpsa_layers(config)
    return tuple(sorted({max(1, round(most * part / 3)) for part in (1, 2, 3)}))


def gpsa_layers(config: ml_collections.ConfigDict) -> int:
    """Returns the number of GPSA layers of a configuration."""
    count = config.model.local_up_to_layer
    if count is None:
        return structure_of(config.model.name or recipe.DEFAULT_MODEL)["local_up_to_layer"]
    return count


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _as_flags(changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the flags that set keys of the configuration."""
    return tuple(f"--config.{key}={value}" for key, value in changes.items())


def _runs(
    config: ml_collections.ConfigDict,
    name: str,
    flags: tuple[str, ...],
    share: float,
    seeds: Sequence[int],
) -> tuple[Run, ...]:
    """Returns a run for each seed, on a share of the training images.

    The epochs, and those between two evaluations, grow as the share falls.
    """
    if share < 1:
        name = f"{name}-images_{share:g}"
        flags += _as_flags(
            {
                "data.sampling_ratio": f"{share:g}",
                "data.epochs_scale": f"{1 / share:.6g}",
                "train.eval_every": f"{config.train.eval_every / share:.6g}",
            }
        )
    return tuple(Run(f"{name}-seed_{seed}", (*flags, f"--config.seed={seed}")) for seed in seeds)
