"""Image sizes in pixels: one number for a square, or (height, width), written 224x320."""

import re

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Returns a size as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def parse(text: str | int, name: str = "image size") -> Size:
    """Reads "384", 384 or "224x320" (height x width).

    Args:
      text: the text or number that the user wrote.
      name: name of the option, for the error message.

    Returns:
      One number for a square, otherwise (height, width).

    Raises:
      ValueError: if `text` has another form, or a side is 0.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip())
    if not match or isinstance(text, bool) or not all(int(side) for side in match.groups("1")):
        raise ValueError(
            f"{name}: expected a number of pixels such as 224, or HEIGHTxWIDTH such as 224x320, "
            f"got {text!r}"
        )
    return single((int(match[1]), int(match[2] or match[1])))


def single(size: Size) -> Size:
    """Returns the side of a square as one number, and a rectangle as (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


def text(size: Size) -> str:
    """Writes a size as `parse` reads it: "224", "224x320"."""
    height, width = pair(size)
    return str(height) if height == width else f"{height}x{width}"
