"""One axis of "resize, then crop", computed from the pixels that the crop needs."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


_LONGEST = 2**16  # longest axis that is resized whole, a quarter of a GB at most


@dataclasses.dataclass(frozen=True)
class Span:
    """One axis of "resize, then crop": the input pixels to read, and the arguments for Pillow.

    Pillow can compute the crop alone, from a box with fractional ends, but it stores the ends in
    float32. If they are exact in float32, as with 256 pixels for any shorter side, then the pixels
    of the crop are exact too. Otherwise the whole axis is resized and then cropped, unless it
    would be very long.

    Attributes:
      first, last: the input pixels [first, last) are read.
      start, stop: ends of the box to resize, in pixels from `first`.
      length: number of pixels that the box is resized to.
      skip: number of resized pixels in front of the crop.
      keep: number of pixels of the crop.
    """

    first: int
    last: int
    start: float
    stop: float
    length: int
    skip: int
    keep: int

    @classmethod
    def of(cls, size: int, resized: int, skip: int, keep: int) -> "Span":
        """Makes the span of an axis: resize `size` pixels to `resized`, skip some, keep `keep`."""
        scale = size / resized
        start, stop = skip * scale, (skip + keep) * scale
        held = (scale, start, stop, stop - start)
        # scale * resized is exact if scale fits into 24 bits.
        exact = scale * resized == size and all(float(np.float32(x)) == x for x in held)
        if not exact and resized <= _LONGEST:
            return cls(0, size, 0, size, resized, skip, keep)
        reach = math.ceil(2 * max(scale, 1)) + 1  # reach of the bicubic kernel
        first, last = max(0, int(start) - reach), min(size, math.ceil(stop) + reach)
        return cls(first, last, start - first, stop - first, keep, 0, keep)

    def resize(self, picture: "Image.Image", axis: int) -> "Image.Image":
        """Resizes and crops a picture along one axis; axis 0 is the width."""
        from PIL import Image

        width, height = picture.size
        start, stop, end = self.start, self.stop, self.skip + self.keep
        bicubic = Image.Resampling.BICUBIC
        if axis == 0:
            resized = picture.resize((self.length, height), bicubic, box=(start, 0, stop, height))
            return resized.crop((self.skip, 0, end, height))
        resized = picture.resize((width, self.length), bicubic, box=(0, start, width, stop))
        return resized.crop((0, self.skip, width, end))
