"""Encoded images to pixels: simplejpeg where it can, Pillow for the rest, the same pixels."""

from collections.abc import Callable
import io
import struct

import numpy as np

_SEGMENT = struct.Struct(">BBH")  # of JPEG: 0xFF, marker, length from here on
_FRAME = struct.Struct(">HHB")  # after a segment's five: height, width, components
Read = Callable[[int], np.ndarray]  # a number of rows -> the image from the top to there, or more


def decode(data: bytes) -> np.ndarray:
    """Decodes an image: (height, width, 3) uint8, the pixels of Pillow's convert("RGB").

    Raises:
      ValueError: if it is no image or a broken one.
    """
    import simplejpeg

    if data[:2] == b"\xff\xd8":
        try:
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data)
        except (ValueError, RuntimeError):
            pass  # broken; Pillow mends what can be mended
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        what = f"{len(data)} bytes that start with {bytes(data[:4])!r}"
        raise ValueError(f"not a readable image ({what}): {error}") from error


def open_image(image: bytes | np.ndarray) -> tuple[int, int, Read]:
    """Returns the height and width of an image and a function that reads its upper part.

    Nothing below is decoded where the file allows that (baseline JPEG, one scan); damage there
    goes unnoticed then. A file that was cut short is refused all the same.

    Args:
      image: an encoded image, or pixels (height, width, 1 or 3) uint8.

    Raises:
      ValueError: if it is neither; from the function too.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            got = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"image: expected uint8 (height, width, 1 or 3), got {got}")
        pixels = image
    elif not isinstance(image, bytes):
        raise ValueError(f"image: expected bytes or an array, got {type(image).__name__}")
    elif (place := _height_in_header(image)) is not None:
        height, width = (int.from_bytes(image[i : i + 2]) for i in (place, place + 2))
        return height, width, lambda rows: _decode_rows(image, place, height, rows)
    else:
        pixels = decode(image)
    return *pixels.shape[:2], lambda rows: pixels


def _decode_rows(data: bytes, place: int, height: int, rows: int) -> np.ndarray:
    """Decodes down to a row, by writing a smaller height into the header.

    Most of the time goes into decoding the entropy code from the top, so a crop that ends at 85 %
    of the height costs 85 %. Two more rows: colour is interpolated from the row below.
    """
    import simplejpeg

    if rows + 2 < height:
        shorter = data[:place] + (rows + 2).to_bytes(2) + data[place + 2 :]
        try:
            # Not strict: what is left over is reported as corrupt. Pillow is not strict either.
            return simplejpeg.decode_jpeg(shorter, strict=False)
        except (ValueError, RuntimeError):
            pass
    return decode(data)


def _height_in_header(data: bytes) -> int | None:
    """Where a JPEG file that can be cut short has its height (2 bytes, then 2 of the width).

    None for anything but a complete baseline JPEG of one scan, grey or colour.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    place, found, components = 2, None, 0
    while place + 10 < len(data):
        start, marker, length = _SEGMENT.unpack_from(data, place)
        if start != 0xFF:
            return None
        if marker == 0xC0 or marker == 0xC1:  # start of frame, see _FRAME
            height, width, components = _FRAME.unpack_from(data, place + 5)
            if not height or not width:
                return None
            found = place + 5
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # progressive, lossless or arithmetic: the scans depend on the height
        elif marker == 0xDD:
            return None  # restart markers
        elif marker == 0xDA:  # the scan; all components at once?
            whole = components in (1, 3) and data[place + 4] == components
            return found if whole else None
        place += 2 + length
    return None
