"""The picture of a study: lines over numeric columns, else points."""

import pathlib

from convit_jax import extras
from convit_jax.analysis import pictures
from convit_jax.study.plans import Study
from convit_jax.study.results import Results

_SIDE_BY_SIDE = 12  # letters of the longest name in a legend of one line


def draw(study: Study, results: Results, path: pathlib.Path) -> None:
    """Draws the table of a study as a PNG file. Error bars show the spread over the seeds.

    Args:
      study: the study.
      results: its results; cells without results are left out.
      path: the file to write.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    with extras.needed("study", "convit study"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = _places(study)
    numeric = [*places.values()] != [*range(len(places))]
    for row in study.rows:
        there = [(places[c], results.get((row, c))) for c in study.columns]
        found = [(place, result) for place, result in there if result and result.values]
        if found:
            axes.errorbar(
                [place for place, _ in found],
                [result.mean or 0.0 for _, result in found],
                [result.spread or 0.0 for _, result in found],
                marker="o", linestyle="-" if numeric else "none", capsize=3, label=row,
            )  # fmt: skip
    if numeric:
        axes.set_xscale("log")
    axes.set_xticks([*places.values()], [*places], minor=False)
    axes.minorticks_off()
    axes.set(xlabel=study.across, ylabel="top-1 accuracy (%)")
    axes.set_title(study.title, fontsize="medium")
    axes.tick_params(axis="x", labelsize="small")
    axes.grid(alpha=0.3)
    if axes.lines:
        narrow = max(map(len, study.rows)) <= _SIDE_BY_SIDE
        figure.legend(
            loc="outside lower center",
            title=study.corner,
            ncols=len(study.rows) if narrow else 1,
            frameon=False,
            fontsize="small",
        )
    pictures.save(figure, path)


def _places(study: Study) -> dict[str, float]:
    """Returns the place of each column on the axis: its value if all are numbers or percentages."""
    try:
        places = {column: float(column.removesuffix("%")) for column in study.columns}
    except ValueError:
        places = {}
    if places and min(places.values()) > 0:
        return places
    return {column: i for i, column in enumerate(study.columns)}
