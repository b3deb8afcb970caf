"""Contact sheets: pictures of what a model will see, with the labels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE = 112  # pixels, least width of a cell; smaller images are enlarged
_GAP = 6  # pixels between cells
_LINE = 14  # pixels, height of a line of text
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray, Sequence[str]]], columns: int = 8
) -> Image.Image:
    """Draws groups of images with their labels below a title.

    Args:
      rows: for each group, the title, the images (n, height, width, 1 or 3) uint8, and a label for
        each. All groups have one size of images.
      columns: number of images side by side.

    Returns:
      The picture.
    """
    height, width, _ = rows[0][1][0].shape
    factor = max(1, -(-_SIDE // width))
    cell_width, cell_height = width * factor + _GAP, height * factor + _LINE + _GAP
    lines = [-(-len(images) // columns) for _, images, _ in rows]
    size = (
        columns * cell_width + _GAP,
        sum(lines) * cell_height + len(rows) * (_LINE + _GAP) + _GAP,
    )
    sheet = Image.new("RGB", size, _WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    top = _GAP
    for (title, images, labels), count in zip(rows, lines, strict=True):
        draw.text((_GAP, top), title, _BLACK, font)
        top += _LINE + _GAP
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            row, column = divmod(i, columns)
            x, y = _GAP + column * cell_width, top + row * cell_height
            sheet.paste(_picture(image, factor), (x, y))
            shown = _shortened(label, cell_width - _GAP, font)
            draw.text((x, y + height * factor + 1), shown, _BLACK, font)
        top += count * cell_height
    return sheet


def _picture(image: np.ndarray, factor: int) -> Image.Image:
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).convert("RGB")
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def _shortened(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Returns a text that fits into a width in pixels, with dots at the end if it was longer."""
    shown = text.encode("latin-1", "replace").decode("latin-1")  # what the font can draw
    while font.getlength(shown) > width and len(shown) > 3:
        shown = shown.removesuffix("..")[:-1] + ".."
    return shown
