"""Reads an image by Pillow as RGB pixels of 8 bits: upright or not, over white or not.

docs/data.md has a table of what happens to each kind of file.
"""

from collections.abc import Mapping
import dataclasses
import functools
import io
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from convit_jax.data.corrupt import CorruptImageError, ImageError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

ALPHAS = ("white", "drop")
MAX_PIXELS = 178_956_970  # Pillow's limit, half a GB of RGB; a small file may claim far more
_ORIENTATION = 0x0112  # EXIF's number of the tag
_CARRIERS = (b"Exif\0\0", b"eXIf", b"Raw profile type exif", b"tiff:Orientation")
# Brands of files that begin with "ftyp", as MP4 films do.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")
_BITS, _PHOTOMETRIC, _FORMAT, _LEAST, _GREATEST = 258, 262, 339, 340, 341  # TIFF's tags


@dataclasses.dataclass(frozen=True)
class Reading:
    """What becomes of an EXIF orientation and of transparent pixels.

    The defaults give timm's pixels: those of Pillow's convert("RGB").

    Attributes:
      exif: whether to turn the image upright, as its EXIF orientation says.
      alpha: "white" puts the image over white. "drop" shows the colours that are stored under
        transparent pixels.
    """

    exif: bool = False
    alpha: str = "drop"

    def __post_init__(self) -> None:
        if self.alpha not in ALPHAS:
            raise ValueError(f"alpha: expected one of {', '.join(ALPHAS)}, got {self.alpha!r}")


AS_SHOWN = Reading(exif=True, alpha="white")  # what viewers show
AS_TIMM = Reading()


def read(data: bytes, reading: Reading) -> np.ndarray:
    """Reads an image by Pillow: (height, width, 3) uint8. Of several frames it takes the first.

    Raises:
      CorruptImageError: if the bytes are not an image, or the image is damaged or too large.
      ImageError: if a package is missing that reads this format.
    """
    try:
        return pixels_of(_open(data), reading)
    except (MemoryError, ImageError):
        raise  # the machine's fault, or said already
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors
        what = f"{len(data)} bytes that start with {bytes(data[:4])!r}"
        raise CorruptImageError(f"not a readable image ({what}): {error}") from error


def pixels_of(picture: "Image.Image", reading: Reading) -> np.ndarray:
    """Returns the pixels of an opened picture: (height, width, 3) uint8."""
    pixels = _rgb(picture, reading)
    return turned(pixels, _orientation(picture)) if reading.exif else pixels


def check_size(width: int, height: int) -> None:
    """Raises CorruptImageError if an image is too large to decode."""
    if width * height > MAX_PIXELS:
        raise CorruptImageError(
            f"expected at most {MAX_PIXELS:,} pixels, got {width} x {height}: damaged, or to be "
            "made smaller"
        )


def orientation(data: bytes) -> int:
    """Returns the EXIF orientation of a JPEG or PNG file: 1 is upright, 2 to 8 are not."""
    if not any(carrier in data for carrier in _CARRIERS):
        return 1  # spares Pillow the header of most files
    try:
        picture = _open(data)
    except MemoryError:
        raise
    except Exception:  # Pillow cannot read the header, though the decoder could
        return 1
    return _orientation(picture)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns pixels (height, width, channels) as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _open(data: bytes) -> "Image.Image":
    from PIL import Image, features

    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise CorruptImageError(f"{error} It is damaged, or to be made smaller") from None
    except Image.UnidentifiedImageError:
        brand = data[8:12] if data[4:8] == b"ftyp" else b""
        if brand not in _HEIC and (brand not in _AVIF or features.check("avif")):
            raise  # damaged, or no image
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            f"a HEIC or AVIF file ({data[8:12]!r}), which Pillow cannot read here: "
            "pip install pillow-heif, or for AVIF pillow>=11.3"
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(data))


def _orientation(picture: "Image.Image") -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF; the pixels are not
        return 1


def _rgb(picture: "Image.Image", reading: Reading) -> np.ndarray:
    from PIL import Image

    over_white = reading.alpha == "white" and picture.has_transparency_data
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        grey = _eight_bits(values, picture)
        if over_white:
            grey[values == picture.info["transparency"]] = 255
        return np.stack([grey, grey, grey], axis=-1)
    if not over_white:
        picture.info.pop("transparency", None)  # changes no pixel, and spares us Pillow's warning
        return np.asarray(picture.convert("RGB"))
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return np.asarray(white)


def _eight_bits(values: np.ndarray, picture: "Image.Image") -> np.ndarray:
    """Scales grey values of more than 8 bits to uint8.

    Values of 16 bits lose their lower 8, as those of RGB files do in Pillow. Values of 32 bits are
    scaled from the least to the greatest value that a TIFF file states, else from those found.
    """
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    # Pillow scales the values of PGM files to 16 bits, and opened PNG so before version 11.
    if picture.mode != "F" and (picture.mode != "I" or picture.format in ("PNG", "PPM")):
        bits = 12 if _first(tags.get(_BITS)) == 12 else 16
        grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    else:
        if picture.mode == "I" and tags and _first(tags.get(_FORMAT, 1)) == 1:
            values = values.view(np.uint32)
        grey = _from_range(values, _first(tags.get(_LEAST)), _first(tags.get(_GREATEST)))
    return 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # 0 says that 0 is white


def _from_range(values: np.ndarray, least: Any, greatest: Any) -> np.ndarray:
    """Scales (height, width) values of a range to uint8; the range None is that of the values."""
    found = float(values.min()), float(values.max())
    if not np.isfinite(found).all():
        raise CorruptImageError("expected finite values, got NaN or infinity")
    if least is None or greatest is None:
        least, greatest = found
        _say_range()
    factor = 255 / (greatest - least) if greatest > least else 0.0
    rows = ((row.astype(np.float64) - least) * factor for row in values)  # saves memory
    return np.stack([np.clip(np.rint(row), 0, 255).astype(np.uint8) for row in rows])


def _first(value: Any) -> Any:
    """Returns the first value of a TIFF tag, which Pillow gives as a number or a tuple."""
    return value[0] if isinstance(value, tuple) else value


@functools.cache
def _say_range() -> None:
    """Logs the rule of the range, once in each process."""
    log.warning(
        "images of 32 bits a pixel without SMinSampleValue and SMaxSampleValue: each is scaled "
        "from its own least value, black, to its greatest, white"
    )
