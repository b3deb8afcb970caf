"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as DeiT uses it: "rand-m9-mstd0.5-inc1".

Two of fifteen operations are drawn with replacement. Each is applied with probability 0.5, at a
magnitude drawn from N(9, 0.5^2) and clipped to [0, 10]. "inc1" means that a larger magnitude always
is a stronger change. The numbers are timm's.

The operations are first drawn, as (name, argument) pairs, and then applied. `apply_exact` applies
them by Pillow and gives timm's pixels to the bit. `apply_fast` applies them by OpenCV and tables,
with the same tables and geometry; its pixels differ by less than a grey level on average.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from convit_jax.data.images.opencv import opencv
from convit_jax.data.images.random_numbers import Given

if TYPE_CHECKING:
    from PIL import Image

Op = tuple[str, Any]  # name and argument, a number; None for an operation without argument

# timm's names in the order of timm's list, so that an index means the same operation.
NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)  # ImageNet's mean colour, for pixels that come from outside the image
NUMBERS = 5  # uniform numbers that an operation takes from `Given`, at most
_PROBABILITY = 0.5  # probability that a chosen operation is applied
_RANGE = {  # argument at the largest magnitude; its sign is drawn
    "Rotate": 30.0,  # degrees, counterclockwise
    "ShearX": 0.3,  # slope: pixels moved per pixel
    "ShearY": 0.3,
    "TranslateXRel": 0.45,  # share of the width
    "TranslateYRel": 0.45,  # share of the height
}
# Added to results because Pillow truncates them to integers and OpenCV rounds them. It is a little
# less than a half, so that results that are integers already do not change.
_CUT = -0.49
_PHASES = 256  # the shears round a distance to 1 / _PHASES of a pixel
_LEVELS = np.arange(256, dtype=np.float32)
_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, Pillow's numbers
_BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")


def draw(rng: np.random.Generator | Given, count: int, magnitude: float, std: float) -> list[Op]:
    """Draws the operations to apply, in order.

    Args:
      rng: the only source of randomness.
      count: number of operations to choose; about half of them are applied.
      magnitude: mean of the magnitude, 0 to 10.
      std: standard deviation of the magnitude before it is clipped.
    """
    ops = []
    for _ in range(count):
        name = NAMES[int(rng.random() * len(NAMES))]  # 10 times faster than rng.integers
        if rng.random() > _PROBABILITY:
            continue
        level = min(max(magnitude + std * rng.standard_normal(), 0.0), MAX_MAGNITUDE)
        negate = rng.random() > 0.5  # always drawn, so that every operation uses as many draws
        ops.append((name, argument(name, level, negate)))
    return ops


def argument(name: str, magnitude: float, negate: bool) -> float | None:
    """Returns the argument of an operation at a magnitude of 0 to 10, in the increasing form.

    The argument is the angle in degrees for Rotate, the slope for the shears, a share of the side
    for the translations, the blending factor for Color, Contrast, Brightness and Sharpness, the
    number of bits kept for Posterize, the threshold for Solarize, the grey levels added for
    SolarizeAdd, and None for the others.

    Args:
      name: one of `NAMES`.
      magnitude: 0 to 10.
      negate: whether to negate the argument, or to blend the other way; ignored by the operations
        that have no opposite.
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
    """Applies an operation to an RGB image by Pillow, with timm's pixels to the bit."""
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
    """Applies an operation to (height, width, 3) uint8 by OpenCV; `image` itself is not changed."""
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
    # The other tables have a simple form, which takes a fraction of the time of a look-up.
    if name == "Posterize":
        return image & np.uint8(-(2 ** (8 - value)) % 256)
    if name == "Solarize":
        bright = cv2.threshold(image, value - 1, 255, cv2.THRESH_BINARY)[1]
        return cv2.bitwise_xor(image, bright)
    dark = cv2.threshold(image, 127, value, cv2.THRESH_BINARY_INV)[1]
    return cv2.add(image, dark)  # SolarizeAdd; cv2.add clips at 255


def _affine(name: str, value: float, height: int, width: int) -> tuple[float, ...]:
    """Returns (a, b, c, d, e, f): output (x, y) is the input at (a x + b y + c, d x + e y + f).

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
    # Rotate about the centre, in the steps of Pillow's Image.rotate: the last bits of c, f matter.
    angle = -math.radians(value % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    c = cos * -x + sin * -y + 0.0
    f = minus_sin * -x + cos * -y + 0.0
    return (cos, sin, c + x, minus_sin, cos, f + y)


def _table(name: str, value: float) -> np.ndarray:
    """Returns (256,) uint8, the result of the operation for every grey level."""
    levels = np.arange(256)
    if name == "Posterize":
        levels = levels & ~(2 ** (8 - int(value)) - 1)  # with 0 bits kept, all black
    elif name == "Solarize":
        levels = np.where(levels < value, levels, 255 - levels)
    else:
        levels = np.where(levels < 128, np.minimum(levels + value, 255), levels)
    return levels.astype(np.uint8)


def _blend_table(factor: float, grey: int) -> np.ndarray:
    """Returns (256,) uint8, every level blended with a grey level.

    A factor of 0 gives the grey level, 1 gives the level itself, and a factor above 1 moves the
    level further away from the grey level.
    """
    blend = np.float32(grey) + np.float32(factor) * (_LEVELS - np.float32(grey))
    # Truncated, not rounded, as in Pillow.
    return np.minimum(np.maximum(blend, 0), 255).astype(np.uint8)


def _autocontrast_table(plane: np.ndarray) -> np.ndarray:
    """Returns (256,) uint8, the table that stretches a channel to 0 ... 255."""
    low, high = int(plane.min()), int(plane.max())
    levels = np.arange(256, dtype=np.float64)
    if high > low:
        scale = 255.0 / (high - low)
        levels = np.clip(np.trunc(levels * scale + -low * scale), 0, 255)
    return levels.astype(np.uint8)


def _equalize_table(plane: np.ndarray) -> np.ndarray:
    """Returns (256,) uint8, the table that flattens the histogram of a channel."""
    histogram = opencv().calcHist([plane], [0], None, [256], [0, 256])
    counts = histogram.ravel().astype(np.int64)
    filled = counts[counts > 0]
    step = (plane.size - int(filled[-1])) // 255
    if len(filled) == 1 or not step:
        return np.arange(256, dtype=np.uint8)
    before = np.cumsum(counts) - counts
    return np.minimum((step // 2 + before) // step, 255).astype(np.uint8)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with its grey version, by one 3 x 3 matrix."""
    red, green, blue = (weight * (1 - factor) for weight in _GREY)
    matrix = [
        [red + factor, green, blue, _CUT],
        [red, green + factor, blue, _CUT],
        [red, green, blue + factor, _CUT],
    ]
    return opencv().transform(image, np.array(matrix, np.float32))


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with its smoothed version; the outermost pixels do not change.

    The smoothing kernel is 5 / 13 for the pixel and 1 / 13 for each of its 8 neighbours.
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
    """Returns Pillow's bicubic kernel (a = -1) at d after pixel 0: weights of pixels -1 to 2."""
    return [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d * (1 + d - d**2), -(d**2) * (1 - d)]


@functools.cache
def _weights() -> np.ndarray:
    """Returns (4, _PHASES) int16, the taps for each fraction of a pixel; each four sum to 64."""
    weights = np.rint(64 * np.array(_taps(np.arange(_PHASES) / _PHASES))).astype(np.int16)
    weights[1] += 64 - weights.sum(axis=0, dtype=np.int16)
    return weights


def _translate(image: np.ndarray, share: float, axis: int) -> np.ndarray:
    """Moves the image along an axis by a share of its side, with one filter of four taps."""
    cv2 = opencv()
    if axis == 0:
        return cv2.transpose(_translate(cv2.transpose(image), share, axis=1))
    height, width = image.shape[:2]
    shift = share * width
    whole = math.floor(shift)
    # One more column in front, since half a pixel outside the image still shows the edge.
    padded = cv2.copyMakeBorder(image, 0, 0, 1, 0, cv2.BORDER_REPLICATE)
    filtered = cv2.filter2D(
        padded, -1, np.array([_taps(shift - whole)], np.float64), anchor=(1, 0), delta=_CUT,
        borderType=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    # Column x shows the input at x + shift, which must be in [-0.5, width - 0.5).
    first = max(0, math.ceil(-0.5 - shift))
    last = min(width, math.ceil(width - 0.5 - shift))
    out = _filled(height, width).copy()
    out[:, first:last] = filtered[:, first + whole + 1 : last + whole + 1]
    return out


def _shear(image: np.ndarray, slope: float, axis: int) -> np.ndarray:
    """Moves every row (axis 1) or column (axis 0) by its own distance, with four taps in 16 bits.

    It is twice as fast as OpenCV's warp and nearer to Pillow: the weights are multiples of 1/64,
    and the result is 0.1 grey levels off.
    """
    cv2 = opencv()
    if axis == 0:
        return cv2.transpose(_shear(cv2.transpose(image), slope, axis=1))
    height, width = image.shape[:2]
    shift = np.rint(slope * _PHASES * _centres(height)).astype(int)
    weights = _weights()[:, shift % _PHASES, None]
    # Read the image as one long line. A moved row is then a piece of it, with one more pixel in
    # front and two behind for the taps. A piece that crosses a border runs into another row, but
    # the output is filled there.
    moved = _pieces(image, shift // _PHASES, width + 3).astype(np.int16)
    # Sums are at most 1.5 * 64 * 255, which fits 16 bits.
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
    """Returns (height, 3 * length), `length` pixels of each row from one before its start.

    Edge pixels are repeated three times beyond the borders. Pixels further out are arbitrary.
    """
    edge = 3
    stride = image.shape[1] + 2 * edge
    extra = math.ceil((int(np.abs(starts).max()) + length) / stride)  # rows to add on each side
    padded = opencv().copyMakeBorder(
        image, extra, extra, edge, edge, opencv().BORDER_REPLICATE
    )  # fmt: skip
    first = 3 * (starts + stride * np.arange(extra, extra + len(starts)) + edge - 1)
    windows = np.ndarray((padded.size - 3 * length + 1, 3 * length), np.uint8, padded, 0, (1, 1))
    return windows[first]


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates by OpenCV's bicubic warp, with `FILL` where Pillow puts it."""
    cv2 = opencv()
    height, width = image.shape[:2]
    a, b, c, d, e, f = _affine("Rotate", degrees, height, width)
    # OpenCV measures from the centre of the first pixel.
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]], np.float64)
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
    """Returns, for every row y, the columns [first, last) where a x + b y + c is in [0, size)."""
    height, width = shape
    x = a * _centres(width)
    start = -b * _centres(height) - c
    if a >= 0:
        return x.searchsorted(start), x.searchsorted(size + start)
    x = x[::-1]
    return width - x.searchsorted(size + start), width - x.searchsorted(start)


def _fill(image: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Puts `FILL` outside the columns [first, last) of every row."""
    height, width = image.shape[:2]
    column = np.arange(width, dtype=np.int32)
    first, last = first.astype(np.int32)[:, None], last.astype(np.int32)[:, None]
    outside = (column < first) | (column >= last)
    return opencv().copyTo(_filled(height, width), outside.view(np.uint8), image)


@functools.lru_cache(maxsize=16)
def _centres(length: int) -> np.ndarray:
    """Returns (length,) centres of the pixels: 0.5, 1.5, ...; cached, so do not change it."""
    return np.arange(length) + 0.5


@functools.lru_cache(maxsize=8)
def _filled(height: int, width: int) -> np.ndarray:
    """Returns (height, width, 3) of the colour `FILL`; cached, so do not change it."""
    return np.full((height, width, 3), FILL, np.uint8)
