"""What happens to a batch on the device, inside the jitted step, before the model sees it.

In the order of DeiT's recipe: normalise, erase, smooth the labels, mix. Everything is float32 and a
function of the batch and the key. The number of devices changes no draw, and no bit while each
device holds a multiple of 8 images: then no device needs another's images. (Otherwise partners are
sent between devices, and XLA may contract the other product of a x + b y into a fused multiply-add:
1 ulp.)

Shapes: B images, G groups of images that share one way of mixing.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from convit_jax.model.normalise import normalise

Array = jax.Array

ERASE_MODES = ("pixel", "const", "rand")

# Random erasing as timm has it, which is Zhong et al. 2020 (arXiv:1708.04896, section 3) but for
# the largest area (0.4 there) and the distribution of the aspect ratio (uniform there).
_ERASE_AREA = (0.02, 1 / 3)  # share of the image
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width, log-uniform
_ERASE_TRIES = 10

# Images exchange their partners within units of 8: 4 images apart, beyond the 3 draws in a row
# of repeated augmentation, and never across devices that hold a multiple of 8.
_UNIT = 8


def soft_labels(labels: Array, num_classes: int, smoothing: float) -> Array:
    """(B,) integers -> (B, num_classes): 1 - smoothing on the label, and smoothing spread evenly
    over all the classes (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


class Box(NamedTuple):
    """Rectangles of pixels, one each, int32: rows top <= y < bottom, columns left <= x < right."""

    top: Array
    bottom: Array
    left: Array
    right: Array

    def area(self) -> Array:
        """In pixels, int32."""
        return (self.bottom - self.top) * (self.right - self.left)

    def mask(self, height: int, width: int) -> Array:
        """(B,) boxes -> (B, height, width, 1) bool, true inside."""
        top, bottom, left, right = (edge[:, None] for edge in self)
        y, x = jnp.arange(height), jnp.arange(width)
        rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
        return (rows[:, :, None] & columns[:, None, :])[..., None]


def random_erase(images: Array, key: Array, *, prob: float, mode: str) -> Array:
    """Random erasing: noise over one rectangle of an image, drawn for every image on its own.

    Args:
      images: (B, height, width, channels) float32, normalised.
      key: of this batch.
      prob: share of images to erase from; 0 is off.
      mode: what is put there. "pixel": N(0, 1) for every value; "rand": one colour from N(0, 1)
        for a box; "const": 0, the mean of the data.
    """
    if prob == 0:
        return images
    batch, height, width, channels = images.shape
    box_key, noise_key = jax.random.split(key)
    inside = _erase_box(box_key, batch, height, width, prob).mask(height, width)
    if mode == "const":
        noise = 0.0
    else:
        shape = images.shape if mode == "pixel" else (batch, 1, 1, channels)
        noise = jax.random.normal(noise_key, shape)
    return jnp.where(inside, noise, images)


def _erase_box(key: Array, batch: int, height: int, width: int, prob: float) -> Box:
    """(B,) boxes, empty for the share 1 - prob of images and where no try fits."""
    # One call for all the draws of an image: every call costs time to compile.
    draws = jax.random.uniform(key, (batch, 3 + 2 * _ERASE_TRIES))
    apply, y, x, tries = draws[:, 0] < prob, draws[:, 1], draws[:, 2], draws[:, 3:]
    area = _between(*_ERASE_AREA, tries[:, :_ERASE_TRIES])
    log_aspect = _between(*map(math.log, _ERASE_ASPECT), tries[:, _ERASE_TRIES:])
    box_height, box_width = erase_size(area, log_aspect, height, width)
    box_height = jnp.where(apply, box_height, 0)
    top, left = _integer(y, height - box_height + 1), _integer(x, width - box_width + 1)
    return Box(top, top + box_height, left, left + box_width)


def _between(low: float, high: float, uniform: Array) -> Array:
    return low + (high - low) * uniform


def _integer(uniform: Array, count: Array | int) -> Array:
    """From [0, 1) to 0, 1, ..., count - 1. Never count: a float32 draw is at most 1 - 2^-23, and
    its product with an integer rounds to less than that."""
    return (uniform * count).astype(jnp.int32)


def erase_size(area: Array, log_aspect: Array, height: int, width: int) -> tuple[Array, Array]:
    """The first of several tries that is smaller than the image both ways.

    Args:
      area, log_aspect: (B, tries), shares of the image's area and log(height / width).
      height, width: of the image, pixels.

    Returns:
      Height and width of the box, (B,) int32 pixels; 0 and 0 where no try fits.
    """
    pixels, aspect = area * (height * width), jnp.exp(log_aspect)
    heights = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = fits & (jnp.cumsum(fits, axis=1) == 1)
    return jnp.where(first, heights, 0).sum(axis=1), jnp.where(first, widths, 0).sum(axis=1)


def mix(
    images: Array,
    labels: Array,
    key: Array,
    *,
    mixup: float,
    cutmix: float,
    prob: float,
    switch_prob: float,
    group_size: int,
) -> tuple[Array, Array]:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) or CutMix (Yun et al. 2019, arXiv:1905.04899).

    The batch is divided into groups of about `group_size` images: with G groups, image i belongs to
    group i mod G. Every group draws whether it is mixed, by which of the two, one lambda and one
    box. So the copies of an image that repeated augmentation puts in a row get different draws, as
    in DeiT, whose sampler sends them to different GPUs, with one draw for each GPU's batch.

    An image's partner is half a unit of 8 images away (half the batch, where 8 does not divide
    it), and is mixed with it in turn (but in odd batches).

    Args:
      images: (B, height, width, channels) float32.
      labels: (B, num_classes) float32, distributions.
      key: of this batch.
      mixup: alpha of lambda ~ Beta(alpha, alpha), the image's own share; 0 is off.
      cutmix: likewise, where lambda is the share left of the image before its box is clipped.
      prob: that a group is mixed at all.
      switch_prob: that it is CutMix, where both are on.
      group_size: images of a group; there are B / group_size groups, rounded up.

    Returns:
      Images and labels as they came in, mixed; with CutMix, labels by the pixels in the box.
    """
    if prob == 0 or mixup == cutmix == 0:
        return images, labels
    batch, height, width, _ = images.shape
    cutmix_prob = switch_prob if mixup > 0 and cutmix > 0 else float(cutmix > 0)
    draw_key, lam_key = jax.random.split(key)
    groups = -(-batch // group_size)
    apply, switch, y, x = jax.random.uniform(draw_key, (4, groups))
    switched = switch < cutmix_prob
    alpha = jnp.where(switched, cutmix, mixup)
    lam = jnp.where(apply < prob, jax.random.beta(lam_key, alpha, alpha), 1.0)
    y, x = _integer(y, height), _integer(x, width)

    # Few numbers, drawn whole on every device and looked up: a sharded draw by rejection would
    # ask all devices after every round whether one is left.
    group = jnp.arange(batch) % groups
    lam, switched, y, x = (draw[group] for draw in (lam, switched, y, x))
    label_share, image_share = lam[:, None], lam[:, None, None, None]
    if cutmix_prob > 0:
        box = cutmix_box(lam, y, x, height, width)
        left_of_image = 1 - box.area() / (height * width)
        label_share = jnp.where(switched, left_of_image, lam)[:, None]
        outside = ~box.mask(height, width)
        image_share = jnp.where(switched[:, None, None, None], outside, image_share)
    return _blend(images, image_share), _blend(labels, label_share)


def cutmix_box(lam: Array, y: Array, x: Array, height: int, width: int) -> Box:
    """The box around the pixel (y, x), of the image's shape and 1 - lambda of its area, clipped
    to the image: timm's rand_bbox. `lam` (B,) float32, `y` and `x` (B,) int32."""
    side = jnp.sqrt(1 - lam)
    cut_height, cut_width = (height * side).astype(jnp.int32), (width * side).astype(jnp.int32)
    return Box(
        jnp.maximum(y - cut_height // 2, 0),
        jnp.minimum(y + (cut_height + 1) // 2, height),
        jnp.maximum(x - cut_width // 2, 0),
        jnp.minimum(x + (cut_width + 1) // 2, width),
    )


def _blend(x: Array, share: Array) -> Array:
    """`share` of every row of x and the rest of its partner; shares of 0 and 1 are exact."""
    return x * share + partner(x) * (1 - share)


def partner(x: Array) -> Array:
    """(B, ...) -> (B, ...): in row i what row i is mixed with.

    That is row 8 (i // 8) + (i + 4) % 8, which is near and therefore on the same device, or
    (i + B // 2) % B where 8 does not divide B.
    """
    batch = x.shape[0]
    if batch % _UNIT:
        return jnp.roll(x, -(batch // 2), axis=0)
    halves = x.reshape(batch // _UNIT, 2, _UNIT // 2, *x.shape[1:])
    return jnp.flip(halves, axis=1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class BatchAugmentation:
    """Turns a batch as the host sends it into what the model is trained on.

    Called with the whole global batch, whose groups and partners are counted from its first image:
    images (B, height, width, channels) uint8, labels (B,) integers, and a key that is used up. It
    returns images of the same shape and labels (B, num_classes), both float32.

    Attributes:
      num_classes: of the labels.
      mean, std: of each channel, see `normalise`.
      smoothing: see `soft_labels`.
      erase_prob, erase_mode: `prob` and `mode` of `random_erase`.
      mixup, cutmix, prob, switch_prob, group_size: see `mix`.

    Raises:
      ValueError: names the configuration key of a value that has no meaning.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smoothing: float
    erase_prob: float
    erase_mode: str
    mixup: float
    cutmix: float
    prob: float
    switch_prob: float
    group_size: int

    def __post_init__(self) -> None:
        shares = {
            "train.label_smoothing": self.smoothing,
            "mixup.erase_prob": self.erase_prob,
            "mixup.prob": self.prob,
            "mixup.switch_prob": self.switch_prob,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
        for name, value in {"mixup.mixup": self.mixup, "mixup.cutmix": self.cutmix}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected 0 (off) or the alpha of a Beta, got {value}")
        if self.erase_mode not in ERASE_MODES:
            raise ValueError(
                f"mixup.erase_mode: expected one of {ERASE_MODES}, got {self.erase_mode!r}"
            )
        if self.group_size < 1:
            raise ValueError(f"mixup.group_size: expected 1 image or more, got {self.group_size}")

    def __call__(self, images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        erase_key, mix_key = jax.random.split(key)
        images = normalise(images, self.mean, self.std)
        images = random_erase(images, erase_key, prob=self.erase_prob, mode=self.erase_mode)
        return mix(
            images,
            soft_labels(labels, self.num_classes, self.smoothing),
            mix_key,
            mixup=self.mixup,
            cutmix=self.cutmix,
            prob=self.prob,
            switch_prob=self.switch_prob,
            group_size=self.group_size,
        )
