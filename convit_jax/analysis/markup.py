"""Parts of an HTML page: tables, pictures inside the page, wide content that scrolls.

All text is escaped. `page.css` has the classes.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_LONG = 30  # letters above which the text of a cell is broken at any place


def missing(reason: str) -> str:
    """Says why something is left out."""
    return f"<p class=missing>Left out: {escape(reason)}</p>"


def folded(title: str, content: str) -> str:
    """Shows a title that a click unfolds."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def side_by_side(figures: Iterable[str]) -> str:
    """Puts figures into as many columns as the width of the page allows."""
    return f"<div class=charts>{''.join(figures)}</div>"


def scrolled(content: str, label: str) -> str:
    """Lets wide content scroll on its own, by keyboard too, so that the page does not."""
    return f'<div class=wide tabindex=0 role=region aria-label="{escape(label)}">{content}</div>'


def table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    kind: str,
    shades: Sequence[Sequence[float]] | None = None,
) -> str:
    """Returns a table. Its first column heads the rows; shades in [0, 1] colour the other cells."""
    lines = []
    for i, (first, *rest) in enumerate(rows):
        cells = []
        for k, text in enumerate(rest):
            shade = "" if shades is None else f' style="--a:{min(1, shades[i][k]):.2f}"'
            cells.append(f"<td{_long(text)}{shade}>{escape(text)}</td>")
        lines.append(f"<tr><th scope=row{_long(first)}>{escape(first)}</th>{''.join(cells)}</tr>")
    heads = "".join(f"<th scope=col><span>{escape(name)}</span></th>" for name in head)
    shaded = "" if shades is None else " shaded"
    return f"<p class=caption>{escape(title)}</p>" + scrolled(
        f'<table class="{kind}{shaded}" aria-label="{escape(title)}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        title,
    )


def _long(text: str) -> str:
    return " class=long" if len(text) > _LONG else ""


def image(picture: "Image.Image", text: str, *, photo: bool) -> str:
    """Returns a picture inside the page: JPEG for a photo, PNG for a few pixels."""
    buffer, kind = io.BytesIO(), "JPEG" if photo else "PNG"
    picture.save(buffer, kind, **({"quality": 88} if photo else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = picture.size
    style = "" if photo else " class=pixels"
    return (
        f'<img{style} alt="{escape(text)}" width={width} height={height} '
        f'src="data:image/{kind.lower()};base64,{data}">'
    )
