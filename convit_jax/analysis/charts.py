"""Line charts as inline SVG, for a page whose style sheet has their colours.

A chart uses these classes of the page: `chart`, `grid`, `line`, `dot` and `swatch`. The variable
`--h` is the hue of a line. The page chooses its lightness, for a dark and a light background.
"""

from collections.abc import Callable, Sequence
import dataclasses
from html import escape
import math

_WIDTH, _HEIGHT = 360, 210  # of the drawing; a phone shows it at this size, so text is legible
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36  # margins
_MOST = 300  # points of a line; more are replaced by means of neighbours
_DOTS = 30  # most points that are marked
_HUES = (215, 25, 150, 320)  # blue, orange, green, magenta
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      name: text of the legend.
      points: (x, y) in the order of x. A y of None, such as a loss that was not finite, is left
        out.
    """

    name: str
    points: Sequence[tuple[float, float | None]]


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    percent: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Returns a figure with its title and legend as HTML; "" if there is nothing to draw.

    Args:
      title: what the y axis shows.
      lines: the lines; up to four differ in colour and dashes, more run through the rainbow.
      x_label: what the x axis shows.
      percent: whether y is a share in [0, 1] to show in percent.
      limits: range of y; None fits the lines.
    """
    kept = [(line.name, _thinned(_finite(line.points))) for line in lines]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x_ticks = _ticks(0, max(xs) or 1, 6)
    y_ticks = _ticks(*(limits or (min(ys), max(ys))), 5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    drawn, said, legend = [], [], []
    for i, (name, points) in enumerate(kept):
        hue = _hue(i, len(kept))
        dashes = _DASHES[i] if len(kept) <= len(_DASHES) else ""
        corners = [place(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in corners)
        drawn.append(
            f'<polyline class="line" style="--h:{hue}" stroke-dasharray="{dashes}" '
            f'points="{path}"/>'
        )
        if len(points) <= _DOTS:
            drawn += [
                f'<circle class="dot" style="--h:{hue}" cx="{x}" cy="{y}" r="2"/>'
                for x, y in corners
            ]
        first, last = (_number(y, percent) for y in (points[0][1], points[-1][1]))
        said.append(f"{name} from {first} to {last}")
        legend.append(
            f'<li><svg class="swatch" viewBox="0 0 28 6" aria-hidden="true"><path class="line" '
            f'style="--h:{hue}" stroke-dasharray="{dashes}" d="M0 3H28"/></svg>'
            f"{escape(name)}: {last}</li>"
        )
    text = escape(f"{title}: {'; '.join(said)}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text}">'
        f"{_axes(x_ticks, y_ticks, place, x_label, percent)}{''.join(drawn)}</svg>"
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
    percent: bool,
) -> str:
    """Returns the lines and numbers of both axes; `place` maps (x, y) to the drawing."""
    parts = []
    for y in y_ticks:
        _, at = place(0, y)
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>')
        text = _number(y, percent)
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{text}</text>')
    for x in x_ticks:
        at, _ = place(x, y_ticks[0])
        parts.append(
            f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_number(x)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points, or the means of neighbours if there are too many."""
    size = math.ceil(len(points) / _MOST)
    if size <= 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers at equal distances, from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10, 20) if span / (unit * f) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _hue(number: int, count: int) -> int:
    """Returns the hue of a line: a colour of its own, or for many lines from violet to red."""
    if count <= len(_HUES):
        return _HUES[number]
    return round(270 - 270 * number / (count - 1))


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g}%"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
