"""Decodes images: JPEG by simplejpeg, PNG by OpenCV, all else by Pillow.

The pixels are Pillow's in any case. What the faster decoders cannot read goes to Pillow, by
`convit_jax.data.images.reading`.
"""

from collections.abc import Callable
import struct

import numpy as np

from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.images.opencv import opencv
from convit_jax.data.images.reading import AS_TIMM, Reading, check_size, orientation, read, turned

_SEGMENT = struct.Struct(">BBH")  # start of a JPEG segment: 0xFF, marker, length from here on
_PNG = b"\x89PNG\r\n\x1a\n"
_SIZE = struct.Struct(">II")  # width and height, from byte 16 of a PNG
_FRAME = struct.Struct(">HHB")  # from byte 5 of a frame segment: height, width, components
Read = Callable[[int], np.ndarray]  # takes n, returns the top n rows or more


def decode(data: bytes, reading: Reading = AS_TIMM) -> np.ndarray:
    """Decodes an image to (height, width, 3) uint8; by default to timm's pixels.

    Raises:
      CorruptImageError: if the bytes are not an image, or the image is damaged or too large.
      ImageError: if a package is missing that reads this format.
    """
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data)
    else:
        pixels = _decode_png(data) if is_plain_png(data) else None
    if pixels is None:
        return read(data, reading)
    return turned(pixels, orientation(data)) if reading.exif else pixels


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decodes a grey or colour JPEG; None if it is damaged, but perhaps Pillow can read it."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)
        return None if colours in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data)
    except CorruptImageError:
        raise
    except (ValueError, RuntimeError):
        return None


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Returns the pixels of Pillow's convert("L"): (height, width, 3) -> (height, width, 1)."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def is_plain_png(data: bytes) -> bool:
    """Returns whether the bytes are a PNG of 8-bit grey or RGB pixels, and nothing else.

    No chunk may stand between the header and the pixels: palettes, transparency and colour
    profiles would.
    """
    return data[:8] == _PNG and data[24:26] in (b"\x08\x00", b"\x08\x02") and data[37:41] == b"IDAT"


def _decode_png(data: bytes) -> np.ndarray | None:
    """Decodes a plain PNG in a quarter of Pillow's time; None if it is damaged.

    OpenCV checks more than Pillow: what it refuses, Pillow may still read.
    """
    cv2 = opencv()
    check_size(*_SIZE.unpack_from(data, 16))
    try:
        pixels = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:  # too large, for instance
        return None
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def open_image(
    image: bytes | np.ndarray, grey: bool = False, reading: Reading = AS_TIMM
) -> tuple[int, int, Read]:
    """Returns the height and width of an image and a function that decodes its upper rows.

    A baseline JPEG file of one scan is decoded only as far down as asked; damage further down is
    not noticed. A truncated file is always refused.

    Args:
      image: an encoded image, or pixels (height, width, 1 or 3) uint8.
      grey: whether an encoded image becomes grey, with one channel.
      reading: how an encoded image is read.

    Raises:
      CorruptImageError: if a file is seen to be damaged. The returned function raises it too.
      ImageError: if a package is missing that reads this format.
      ValueError: if `image` is neither.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            got = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"image: expected uint8 (height, width, 1 or 3), got {got}")
        return *image.shape[:2], lambda rows: image
    if not isinstance(image, bytes):
        raise ValueError(f"image: expected bytes or an array, got {type(image).__name__}")
    finish = to_grey if grey else lambda pixels: pixels
    place = _height_in_header(image)
    if place is not None and (not reading.exif or orientation(image) == 1):
        height, width = (int.from_bytes(image[i : i + 2]) for i in (place, place + 2))
        check_size(width, height)
        return height, width, lambda rows: finish(_decode_rows(image, place, height, rows))
    pixels = finish(decode(image, reading))
    return *pixels.shape[:2], lambda rows: pixels


def _decode_rows(data: bytes, place: int, height: int, rows: int) -> np.ndarray:
    """Decodes the upper `rows` rows, and two more, by writing a smaller height into the header.

    Entropy decoding takes most of the time, and it runs from the top: a crop that ends at 85 % of
    the height takes 85 % of the time. The two extra rows are needed because colour is
    interpolated from the row below.
    """
    import simplejpeg

    if rows + 2 < height:
        shorter = data[:place] + (rows + 2).to_bytes(2) + data[place + 2 :]
        try:
            # Strict decoding would refuse the rows left over. Pillow is not strict either.
            return simplejpeg.decode_jpeg(shorter, strict=False)
        except (ValueError, RuntimeError):
            pass
    return decode(data)


def _height_in_header(data: bytes) -> int | None:
    """Returns where a JPEG header has the height, if it may be lowered to decode fewer rows.

    The height takes 2 bytes there, and the width the next 2. Returns None unless the file is a
    complete baseline JPEG of one scan, grey or colour.
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
        elif marker == 0xDA:  # start of a scan, which must hold all components
            whole = components in (1, 3) and data[place + 4] == components
            return found if whole else None
        place += 2 + length
    return None
