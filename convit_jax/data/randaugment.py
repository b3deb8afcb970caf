"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as DeiT uses it: "rand-m9-mstd0.5-inc1".

Two operations out of fifteen, with replacement, each applied with probability 0.5 at a magnitude
drawn from N(9, 0.5^2) and clipped to [0, 10]; "inc1" is the form in which a larger magnitude
always means a stronger change. The numbers are timm's.

What to do is drawn first, as (name, argument) pairs, and then applied by Pillow (`apply_exact`:
timm's pixels to the bit) or by OpenCV and tables (`apply_fast`: the same tables, the same
geometry, pixels within a grey level on average).
"""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from convit_jax.data.opencv import opencv

if TYPE_CHECKING:
    from PIL import Image

Op = tuple[str, float | None]  # name and argument; None where there is none

# By timm's names; the order is that of timm's list, so that an index means the same operation.
NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)  # ImageNet's mean colour, for what comes from outside the image
_PROBABILITY = 0.5  # of an operation that was chosen to be applied
_RANGE = {  # argument at the largest magnitude; its sign is drawn
    "Rotate": 30.0,  # degrees, counterclockwise
    "ShearX": 0.3,  # pixels a pixel
    "ShearY": 0.3,
    "TranslateXRel": 0.45,  # of the width
    "TranslateYRel": 0.45,  # of the height
}
# Pillow cuts a result to an integer where OpenCV rounds it; a little less than a half, so that
# what is an integer already stays.
_CUT = -0.49
_PHASES = 256  # of a pixel, to which the shears round a distance
_LEVELS = np.arange(256, dtype=np.float32)
_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, Pillow's numbers
_BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")


def draw(rng: np.random.Generator, count: int, magnitude: float, std: float) -> list[Op]:
    """Draws what is to be applied, in order.

    Args:
      rng: the only source of randomness.
      count: operations to choose; about half of them are applied.
      magnitude: 0 to 10, the mean.
      std: standard deviation of the magnitude before it is clipped.
    """
    ops = []
    for _ in range(count):
        name = NAMES[int(rng.random() * len(NAMES))]  # a tenth of the time of rng.integers
        if rng.random() > _PROBABILITY:
            continue
        level = min(max(magnitude + std * rng.standard_normal(), 0.0), MAX_MAGNITUDE)
        negate = rng.random() > 0.5  # drawn for every operation: one order of draws for all
        ops.append((name, argument(name, level, negate)))
    return ops


def argument(name: str, magnitude: float, negate: bool) -> float | None:
    """What an operation is called with at a magnitude of 0 to 10, in the increasing form.

    Degrees for Rotate; slope for the shears; a share of the side for the translations; the factor
    of the blend for Color, Contrast, Brightness and Sharpness; the bits kept for Posterize; the
    threshold for Solarize; what is added for SolarizeAdd; None for the rest.
    """
    share = magnitude / MAX_MAGNITUDE
    if name in _RANGE:
        return -share * _RANGE[name] if negate else share * _RANGE[name]
    if name in _BLENDS:
        return max(0.1, 1 - share * 0.9 if negate else 1 + share * 0.9)
    if name == "Posterize":
        return 4 - int(share * 4)
    if name == "Solarize":
        return 256 - min(256, int(share * 256))
    if name == "SolarizeAdd":
        return min(128, int(share * 110))
    return None


def apply_exact(image: "Image.Image", op: Op) -> "Image.Image":
    """Applies an operation by Pillow, as timm does: the same pixels. `image` is RGB."""
    from PIL import Image, ImageEnhance, ImageOps

    name, value = op
    if name in _BLENDS:
        return getattr(ImageEnhance, name)(image).enhance(value)
    if name in _RANGE:
        width, height = image.size
        return image.transform(
            image.size, Image.Transform.AFFINE, _affine(name, value, height, width),
            resample=Image.Resampling.BICUBIC, fillcolor=FILL,
        )  # fmt: skip
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        return image.point(_table(name, value).tolist() * 3)
    return getattr(ImageOps, name.lower())(image)


def apply_fast(image: np.ndarray, op: Op) -> np.ndarray:
    """Applies an operation by OpenCV. `image` is (height, width, 3) uint8 and stays as it is."""
    name, value = op
    if name == "Rotate":
        return _rotate(image, value)
    if name in _RANGE:
        move = _shear if name.startswith("Shear") else _translate
        return move(image, value, axis=1 if "X" in name else 0)
    cv2 = opencv()
    if name == "Color":
        return _color(image, value)
    if name == "Sharpness":
        return _sharpness(image, value)
    if name == "Contrast":
        mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
        return cv2.LUT(image, _blend_table(value, mean))
    if name == "Brightness":
        return cv2.LUT(image, _blend_table(value, 0))
    if name == "Invert":
        return cv2.bitwise_not(image)
    if name in ("AutoContrast", "Equalize"):
        table = _autocontrast_table if name == "AutoContrast" else _equalize_table
        return cv2.merge([cv2.LUT(plane, table(plane)) for plane in cv2.split(image)])
    # The tables of the rest have a simple form that costs a fraction of a look-up.
    if name == "Posterize":
        return image & np.uint8(-(2 ** (8 - value)) % 256)
    if name == "Solarize":
        bright = cv2.threshold(image, value - 1, 255, cv2.THRESH_BINARY)[1]
        return cv2.bitwise_xor(image, bright)
    dark = cv2.threshold(image, 127, value, cv2.THRESH_BINARY_INV)[1]
    return cv2.add(image, dark)  # SolarizeAdd; saturates


def _affine(name: str, value: float, height: int, width: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): output (x, y) shows the input at (a x + b y + c, d x + e y + f).

    Points are measured from the corner of the image: the centre of the first pixel is (0.5, 0.5).
    """
    if name == "ShearX":
        return (1, value, 0, 0, 1, 0)
    if name == "ShearY":
        return (1, 0, 0, value, 1, 0)
    if name == "TranslateXRel":
        return (1, 0, value * width, 0, 1, 0)
    if name == "TranslateYRel":
        return (1, 0, 0, 0, 1, value * height)
    # About the centre, in the steps of Pillow's Image.rotate: the last bits of c and f matter.
    angle = -math.radians(value % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    c = cos * -x + sin * -y + 0.0
    f = minus_sin * -x + cos * -y + 0.0
    return (cos, sin, c + x, minus_sin, cos, f + y)


def _table(name: str, value: float) -> np.ndarray:
    """(256,) uint8, the operation on every grey level."""
    levels = np.arange(256)
    if name == "Posterize":
        levels = levels & ~(2 ** (8 - value) - 1)  # 0 bits: black
    elif name == "Solarize":
        levels = np.where(levels < value, levels, 255 - levels)
    else:
        levels = np.where(levels < 128, np.minimum(levels + value, 255), levels)
    return levels.astype(np.uint8)


def _blend_table(factor: float, grey: int) -> np.ndarray:
    """(256,) uint8: from a constant grey (factor 0) through the level (1) to beyond it."""
    blend = np.float32(grey) + np.float32(factor) * (_LEVELS - np.float32(grey))
    # Cut, not rounded, as Pillow does.
    return np.minimum(np.maximum(blend, 0), 255).astype(np.uint8)


def _autocontrast_table(plane: np.ndarray) -> np.ndarray:
    """(256,) uint8: a channel stretched to 0 ... 255."""
    low, high = int(plane.min()), int(plane.max())
    levels = np.arange(256, dtype=np.float64)
    if high > low:
        scale = 255.0 / (high - low)
        levels = np.clip(np.trunc(levels * scale + -low * scale), 0, 255)
    return levels.astype(np.uint8)


def _equalize_table(plane: np.ndarray) -> np.ndarray:
    """(256,) uint8: a channel's histogram made flat."""
    histogram = opencv().calcHist([plane], [0], None, [256], [0, 256])
    counts = histogram.ravel().astype(np.int64)
    filled = counts[counts > 0]
    step = (plane.size - int(filled[-1])) // 255
    if len(filled) == 1 or not step:
        return np.arange(256, dtype=np.uint8)
    before = np.cumsum(counts) - counts
    return np.minimum((step // 2 + before) // step, 255).astype(np.uint8)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image, by one 3 x 3 matrix."""
    red, green, blue = (weight * (1 - factor) for weight in _GREY)
    matrix = [
        [red + factor, green, blue, _CUT],
        [red, green + factor, blue, _CUT],
        [red, green, blue + factor, _CUT],
    ]
    return opencv().transform(image, np.float32(matrix))


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the smoothed image: weight 5 for the pixel and 1 for each of 8 neighbours, / 13.

    The outermost pixels stay.
    """
    cv2 = opencv()
    box = cv2.blur(image, (3, 3))  # smooth = 9/13 box + 4/13 pixel
    out = cv2.addWeighted(
        image, factor + (1 - factor) * 4 / 13, box, (1 - factor) * 9 / 13, _CUT
    )  # fmt: skip
    for edge in (0, -1):
        out[edge] = image[edge]
        out[:, edge] = image[:, edge]
    return out


def _taps(d: np.ndarray | float) -> list[np.ndarray | float]:
    """Pillow's bicubic kernel (a = -1) for a point d after a pixel: weights of pixels -1 to 2."""
    return [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d * (1 + d - d**2), -(d**2) * (1 - d)]


@functools.cache
def _weights() -> np.ndarray:
    """(4, _PHASES) int16: the taps for each fraction of a pixel, in units of 1/64; sum 64."""
    weights = np.rint(64 * np.array(_taps(np.arange(_PHASES) / _PHASES))).astype(np.int16)
    weights[1] += 64 - weights.sum(axis=0, dtype=np.int16)
    return weights


def _translate(image: np.ndarray, share: float, axis: int) -> np.ndarray:
    """Moves the image along an axis by a share of it: one filter of four taps."""
    cv2 = opencv()
    if axis == 0:
        return cv2.transpose(_translate(cv2.transpose(image), share, axis=1))
    height, width = image.shape[:2]
    shift = share * width
    whole = math.floor(shift)
    # A column before the first: half a pixel outside still shows the edge.
    padded = cv2.copyMakeBorder(image, 0, 0, 1, 0, cv2.BORDER_REPLICATE)
    filtered = cv2.filter2D(
        padded, -1, np.float64([_taps(shift - whole)]), anchor=(1, 0), delta=_CUT,
        borderType=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    # Column x shows the input at x + shift, which has to be in [-0.5, width - 0.5).
    first = max(0, math.ceil(-0.5 - shift))
    last = min(width, math.ceil(width - 0.5 - shift))
    out = _filled(height, width).copy()
    out[:, first:last] = filtered[:, first + whole + 1 : last + whole + 1]
    return out


def _shear(image: np.ndarray, slope: float, axis: int) -> np.ndarray:
    """Moves every row (axis 1) or column by its own distance, four taps in 16 bits.

    Twice as fast as OpenCV's warp and nearer to Pillow: weights of 1/64, 0.1 grey levels off.
    """
    cv2 = opencv()
    if axis == 0:
        return cv2.transpose(_shear(cv2.transpose(image), slope, axis=1))
    height, width = image.shape[:2]
    shift = np.rint(slope * _PHASES * _centres(height)).astype(int)
    weights = _weights()[:, shift % _PHASES, None]
    # Row y as it will lie, from the pixel before its first to the second after its last, is a
    # piece of the whole image read as one line. Beyond the borders it runs into the rows around,
    # but only where the output is filled.
    moved = _pieces(image, shift // _PHASES, width + 3).astype(np.int16)
    # At most 1.5 * 64 * 255, which 16 bits hold.
    total = moved[:, : width * 3] * weights[0]
    term = np.empty_like(total)
    for tap in range(1, 4):
        np.multiply(moved[:, tap * 3 : (tap + width) * 3], weights[tap], out=term)
        total += term
    total >>= 6
    np.maximum(total, 0, out=total)
    np.minimum(total, 255, out=total)
    out = total.astype(np.uint8).reshape(image.shape)
    return _fill(out, *_inside(1, slope, 0, (height, width), width))


def _pieces(image: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(height, 3 * length): of every row `length` pixels from the one before `starts` on.

    The edges are there three times; what lies further out is arbitrary.
    """
    edge = 3
    stride = image.shape[1] + 2 * edge
    extra = math.ceil((int(np.abs(starts).max()) + length) / stride)  # rows, so as not to run out
    padded = opencv().copyMakeBorder(
        image, extra, extra, edge, edge, opencv().BORDER_REPLICATE
    )  # fmt: skip
    first = 3 * (starts + stride * np.arange(extra, extra + len(starts)) + edge - 1)
    windows = np.ndarray((padded.size - 3 * length + 1, 3 * length), np.uint8, padded, 0, (1, 1))
    return windows[first]


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """OpenCV's bicubic inside, `FILL` where Pillow puts it."""
    cv2 = opencv()
    height, width = image.shape[:2]
    a, b, c, d, e, f = _affine("Rotate", degrees, height, width)
    # OpenCV measures from the centre of the first pixel.
    matrix = np.float64([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    out = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    shape = height, width
    in_x, in_y = _inside(a, b, c, shape, width), _inside(d, e, f, shape, height)
    return _fill(out, np.maximum(in_x[0], in_y[0]), np.minimum(in_x[1], in_y[1]))


def _inside(
    a: float, b: float, c: float, shape: tuple[int, int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of every row y the columns [first, last) whose pixels have a x + b y + c in [0, size)."""
    height, width = shape
    x = a * _centres(width)
    start = -b * _centres(height) - c
    if a >= 0:
        return x.searchsorted(start), x.searchsorted(size + start)
    x = x[::-1]
    return width - x.searchsorted(size + start), width - x.searchsorted(start)


def _fill(image: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The image with `FILL` outside the columns [first, last) of every row."""
    height, width = image.shape[:2]
    column = np.arange(width, dtype=np.int32)
    first, last = first.astype(np.int32)[:, None], last.astype(np.int32)[:, None]
    outside = (column < first) | (column >= last)
    return opencv().copyTo(_filled(height, width), outside.view(np.uint8), image)


@functools.lru_cache(maxsize=16)
def _centres(length: int) -> np.ndarray:
    """(length,) the centres of the pixels: 0.5, 1.5, ...; shared, so not to be changed."""
    return np.arange(length) + 0.5


@functools.lru_cache(maxsize=8)
def _filled(height: int, width: int) -> np.ndarray:
    """(height, width, 3) of `FILL`; shared, so to be copied from only."""
    return np.full((height, width, 3), FILL, np.uint8)
