"""The results of a study: the accuracy of each cell of its table, as text and as JSON."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import statistics
from typing import Any

from convit_jax.study.plans import Cell, Run, Study
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.metric_files import read_lines


@dataclasses.dataclass(frozen=True)
class Result:
    """The accuracies of a cell.

    Attributes:
      values: top-1 accuracy of each finished run, in percent.
      wanted: number of runs that the study asks for.
    """

    values: tuple[float, ...]
    wanted: int

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the seeds; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """Returns MEAN +- SPREAD in percent, and how many runs these are if some are missing."""
        if self.mean is None:
            return "-"
        text = f"{self.mean:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "")
        some = len(self.values)
        return text if some == self.wanted else f"{text} ({some} of {self.wanted})"


Results = Mapping[tuple[str, str], Result]


def collect(study: Study, folder: pathlib.Path) -> Results:
    """Reads the accuracy of every finished run: that of its last evaluation, of the last step.

    The paper's recipe chooses no checkpoint by the test images, and neither does this table. Where
    a run averages its weights, the accuracy is that of the averaged weights.

    Args:
      study: the study.
      folder: folder of the runs.
    """
    return {(cell.row, cell.column): _result(cell, folder) for cell in study.cells}


def _result(cell: Cell, folder: pathlib.Path) -> Result:
    found = [_accuracy(run, cell.masked, folder) for run in cell.runs]
    return Result(tuple(100 * top1 for top1 in found if top1 is not None), len(cell.runs))


def _accuracy(
    run: Run, masked: tuple[str, int | None] | None, folder: pathlib.Path
) -> float | None:
    """Returns the top-1 accuracy of a run; None if it has not finished."""
    workdir = Workdir(folder / run.name)
    if masked is not None:
        if not workdir.masking.exists():
            return None
        lines = json.loads(workdir.masking.read_text())["results"]
        return next((x["top1"] for x in lines if (x["masked"], x["layers"]) == masked), None)
    if not workdir.weights.exists():
        return None
    last = [line for line in read_lines(workdir) if line["kind"] == "eval"][-1]
    return last.get("ema_top1", last["top1"])


def markdown(study: Study, results: Results) -> str:
    """Returns the table of a study in Markdown."""
    head = [study.corner, *study.columns]
    rows = [
        [row, *(results[row, c].text() if (row, c) in results else "" for c in study.columns)]
        for row in study.rows
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def to_json(study: Study, results: Results, config: Mapping[str, Any]) -> str:
    """Returns the results of a study, with its runs and its base configuration, as JSON text."""
    cells = [
        {
            "row": cell.row,
            "column": cell.column,
            "masked": cell.masked,
            "top1_percent": results[cell.row, cell.column].values,
            "mean": results[cell.row, cell.column].mean,
            "spread": results[cell.row, cell.column].spread,
            "runs": [{"name": run.name, "flags": run.flags} for run in cell.runs],
        }
        for cell in study.cells
    ]
    content = {"study": study.name, "title": study.title, "cells": cells, "config": config}
    return json.dumps(content, indent=2) + "\n"
