"""Image transforms on the host: an encoded image and a generator in, uint8 pixels out.

Two backends make the same random choices from the same random numbers. "fast" uses OpenCV. "exact"
uses Pillow and gives timm's pixels to the bit. Evaluation always uses Pillow. Normalising, erasing
and mixing are done in batches on the device, by `convit_jax.train.augmentation`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from convit_jax.data.images import randaugment
from convit_jax.data.images.decode import open_image, to_grey
from convit_jax.data.images.opencv import opencv
from convit_jax.data.images.pad_crop import NUMBERS, pad_and_crop, pad_crop_flip
from convit_jax.data.images.random_numbers import Given, Uniform
from convit_jax.data.images.reading import AS_TIMM, Reading
from convit_jax.data.images.span import Span
from convit_jax.model.image_size import pair

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("random_resized", "pad", "none")
BACKENDS = ("fast", "exact")
_JITTER = ("Brightness", "Contrast", "Color")  # "Color" is saturation in torchvision


def random_box(
    height: int,
    width: int,
    rng: Uniform,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a crop (top, left, height, width) in pixels, as torchvision's RandomResizedCrop.

    If ten drawn boxes do not fit into the image, the crop is the largest centred box whose ratio is
    in the range.

    Args:
      height, width: size of the image in pixels.
      rng: draws area, ratio and place.
      scale: range of the crop's share of the image's area, drawn uniformly.
      ratio: range of the crop's width over its height, drawn log-uniformly.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # rng.random() is five times faster than rng.uniform and rng.integers.
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.random() * (height - h + 1), rng.random() * (width - w + 1)
            return int(top), int(left), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Crop, flip, and RandAugment or colour jitter; by default DeiT's recipe.

    A call takes (image, rng). The image is the bytes of a file or (height, width, 1 or 3) uint8.
    The generator `rng` is the only source of randomness. The call returns (*size, channels) uint8,
    with as many channels as the array has, or 3 for the bytes of a file (1 with `grey`). It raises
    ValueError if the image cannot be read, or if crop "pad" needs another size. The colours of an
    image of one channel are changed as those of its RGB copy, which becomes grey again.

    Attributes:
      size: size of the output in pixels, the side of a square or (height, width).
      crop: "random_resized" (see `random_box`), "pad" (see `pad_and_crop`; the images must already
        have `size`) or "none" (see `EvalTransform`).
      scale, ratio: arguments of `random_box`, with crop "random_resized".
      flip: probability of a horizontal flip.
      randaugment_ops: number of operations to choose, see `randaugment.draw`; 0 is off.
      randaugment_magnitude: mean magnitude, 0 to 10.
      randaugment_std: standard deviation of the magnitude.
      color_jitter: strength c of the colour jitter, used if RandAugment is off. Brightness,
        contrast and saturation change by factors from 1 - c to 1 + c, in a random order.
      pad_crop: width of the borders in pixels, with crop "pad".
      backend: "fast" or "exact".
      crop_pct: argument of `EvalTransform`, with crop "none".
      grey: whether files are decoded to one channel.
      reading: how the bytes of a file are read; by default as timm reads them.
    """

    size: int | tuple[int, int]
    crop: str = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    color_jitter: float = 0.4
    pad_crop: int = 0
    backend: str = "fast"
    crop_pct: float = 0.875
    grey: bool = False
    reading: Reading = AS_TIMM

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_crop_pct(self.crop_pct)
        _check("crop", self.crop, f"one of {', '.join(CROPS)}", self.crop in CROPS)
        _check("backend", self.backend, "fast or exact", self.backend in BACKENDS)
        _check("scale", self.scale, "0 < low <= high <= 1", _is_range(self.scale, 1))
        _check("ratio", self.ratio, "0 < low <= high", _is_range(self.ratio, math.inf))
        _check("flip", self.flip, "a probability", 0 <= self.flip <= 1)
        for name in ("randaugment_ops", "randaugment_std", "color_jitter", "pad_crop"):
            value = getattr(self, name)
            _check(name, value, "0 or more", value >= 0)
        magnitude = self.randaugment_magnitude
        _check("randaugment_magnitude", magnitude, "0 to 10", 0 <= magnitude <= 10)

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator | Given) -> np.ndarray:
        height, width, read = open_image(image, self.grey, self.reading)
        if self.crop == "random_resized":
            top, left, h, w = random_box(height, width, rng, self.scale, self.ratio)
            pixels = read(top + h)[top : top + h, left : left + w]
        elif self.crop == "pad":
            pixels = pad_and_crop(self._of_size(read(height)), rng, self.pad_crop)
        else:
            pixels = EvalTransform(self.size, self.crop_pct, self.grey, self.reading)(image)
        flip = rng.random() < self.flip
        ops = self._draw_ops(rng)
        finish = _finish_fast if self.backend == "fast" else _finish_exact
        return finish(pixels, pair(self.size), flip, ops)

    @property
    def numbers(self) -> int:
        """Number of uniform numbers that `of_chunk` needs for each image; 0 if it cannot be used.

        It can be used with crop "pad", where a whole chunk of images is cropped at once.
        """
        if self.crop != "pad":
            return 0
        jitter = 2 * len(_JITTER) if self.color_jitter else 0
        return NUMBERS + (randaugment.NUMBERS * self.randaugment_ops or jitter)

    def pixels(self, image: bytes | np.ndarray) -> np.ndarray:
        """Decodes an image for `of_chunk`; raises ValueError as a call does."""
        height, _, read = open_image(image, self.grey, self.reading)
        return self._of_size(read(height))

    def of_chunk(self, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Transforms many images at once, with crop "pad"; faster than a call for each.

        Args:
          images: (n, *size, channels) uint8, all from `pixels`; not changed.
          numbers: (n, self.numbers) uniform in [0, 1). Row i determines what happens to image i:
            the same as in a call with `Given(numbers[i])`.
        """
        out = pad_crop_flip(images, numbers, self.pad_crop, self.flip)
        if self.randaugment_ops or self.color_jitter:
            finish = _finish_fast if self.backend == "fast" else _finish_exact
            for image, row in zip(out, numbers[:, NUMBERS:].tolist(), strict=True):
                if ops := self._draw_ops(Given(row)):
                    image[...] = finish(image, pair(self.size), False, ops)
        return out

    def _draw_ops(self, rng: np.random.Generator | Given) -> list[randaugment.Op]:
        if self.randaugment_ops:
            return randaugment.draw(
                rng, self.randaugment_ops, self.randaugment_magnitude, self.randaugment_std
            )
        if not self.color_jitter:
            return []
        low, high = max(0, 1 - self.color_jitter), 1 + self.color_jitter
        factors = rng.uniform(low, high, size=len(_JITTER))
        return [(_JITTER[i], float(factors[i])) for i in rng.permutation(len(_JITTER))]

    def _of_size(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] != pair(self.size):
            raise ValueError(
                f"crop 'pad': expected images of {pair(self.size)} pixels, got "
                f"{pixels.shape[:2]}; crop 'random_resized' resizes"
            )
        return pixels


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resizes the shorter side to floor(size / crop_pct), antialiased bicubic, and cuts the centre.

    A call takes an image and returns pixels, both as for `TrainTransform`. The pixels are those of
    timm's evaluation transform.

    Attributes:
      size: size of the output in pixels, the side of a square or (height, width).
      crop_pct: side of the output over the side of the resized image.
      grey: whether files are decoded to one channel.
      reading: how the bytes of a file are read; by default as timm reads them.
    """

    size: int | tuple[int, int]
    crop_pct: float = 0.875
    grey: bool = False
    reading: Reading = AS_TIMM

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_crop_pct(self.crop_pct)

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        height, width, read = open_image(image, self.grey, self.reading)
        h, w = pair(self.size)
        resized_h, resized_w = self._resized(height, width)
        if (height, width) == (resized_h, resized_w) == (h, w):
            return read(height)
        top, left = round((resized_h - h) / 2), round((resized_w - w) / 2)
        rows = Span.of(height, resized_h, top, h)
        columns = Span.of(width, resized_w, left, w)
        pixels = read(rows.last)[rows.first : rows.last, columns.first : columns.last]
        picture = _to_picture(pixels)
        # First along the width and then along the height, in Pillow's own order.
        picture = columns.resize(picture, axis=0)
        return _to_array(rows.resize(picture, axis=1))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns (height, width) of the resized image, by the rules of timm and torchvision."""
        h, w = (math.floor(side / self.crop_pct) for side in pair(self.size))
        if h == w:
            longer = int(h * max(height, width) / min(height, width))
            return (longer, w) if width <= height else (h, longer)
        shrink = min(height / h, width / w)
        return round(height / shrink), round(width / shrink)


def _finish_fast(
    pixels: np.ndarray, size: tuple[int, int], flip: bool, ops: list[randaugment.Op]
) -> np.ndarray:
    """Resizes, flips and applies the operations with OpenCV."""
    shape = *size, pixels.shape[2]
    if pixels.shape[:2] != size:
        pixels = _resize_fast(pixels, size)
    if flip:
        pixels = opencv().flip(pixels, 1)
    pixels = np.ascontiguousarray(pixels).reshape(shape)  # OpenCV drops a single channel
    if not ops:
        return pixels
    changed = np.repeat(pixels, 3, axis=2) if shape[2] == 1 else pixels
    for op in ops:
        changed = randaugment.apply_fast(changed, op)
    return to_grey(changed) if shape[2] == 1 else changed


def _finish_exact(
    pixels: np.ndarray, size: tuple[int, int], flip: bool, ops: list[randaugment.Op]
) -> np.ndarray:
    """Resizes, flips and applies the operations with Pillow."""
    from PIL import Image

    picture = _to_picture(pixels)
    if pixels.shape[:2] != size:
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not ops:
        return _to_array(picture)
    changed = picture.convert("RGB") if picture.mode == "L" else picture
    for op in ops:
        changed = randaugment.apply_exact(changed, op)
    return _to_array(changed.convert(picture.mode))


def _resize_fast(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes by bicubic interpolation, after a blur along each axis that shrinks.

    A standard deviation of a third of an output pixel comes nearest to Pillow's antialiased
    bicubic: it is 0.3 to 1.5 grey levels off on photos. OpenCV's INTER_AREA is 0.4 to 1.5 off and
    takes twice the time. Bicubic without the blur is up to 8 off.
    """
    cv2 = opencv()
    shrink = pixels.shape[1] / size[1], pixels.shape[0] / size[0]
    if min(shrink) > 3:  # a blur that wide would take longer than INTER_AREA
        return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
    if max(shrink) > 1:
        # One tap is no blur. Up to a shrink of 2, three are enough: the next would be below 0.01.
        taps = [2 * math.ceil(s) - 1 if s > 1 else 1 for s in shrink]
        sigmas = [s / 3 for s in shrink]
        pixels = cv2.GaussianBlur(pixels, taps, *sigmas, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)


def _to_picture(pixels: np.ndarray) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def _to_array(picture: "Image.Image") -> np.ndarray:
    array = np.array(picture)
    return array if array.ndim == 3 else array[..., None]


def _is_range(values: tuple[float, float], highest: float) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1] <= highest


def _check(name: str, value: object, expected: str, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_size(size: int | tuple[int, int]) -> None:
    valid = isinstance(size, int) or (len(size) == 2 and all(isinstance(x, int) for x in size))
    valid = valid and min(pair(size)) > 0
    _check("size", size, "a side or (height, width) in pixels", valid)


def _check_crop_pct(crop_pct: float) -> None:
    _check("crop_pct", crop_pct, "0 < crop_pct <= 1", 0 < crop_pct <= 1)
