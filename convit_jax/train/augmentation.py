"""Augmentation of a batch on the device, inside the jitted step, before the model sees it.

The order is that of DeiT's recipe: normalise, erase, smooth the labels, mix. Everything is float32
and a function of the batch and the key. The random numbers do not depend on the number of devices.
If each device holds a multiple of 8 images, the results are the same to the bit for any number of
devices, and no device needs images of another. Otherwise partners are sent between devices. XLA may
then fuse a different product of a x + b y into a multiply-add, which changes results by 1 ulp.

Shapes: B images, G groups; the images of a group are mixed with the same random numbers.
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

# timm's random erasing. It differs from Zhong et al. 2020 (arXiv:1708.04896, section 3) in two
# points: the paper's largest area is 0.4, and its aspect ratio is drawn uniformly.
_ERASE_AREA = (0.02, 1 / 3)  # share of the image
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width, log-uniform
_ERASE_TRIES = 10

# Partners are 4 images apart within units of 8 images. So the 3 copies that repeated augmentation
# puts in a row are never partners, and partners are on one device if it holds a multiple of 8.
_UNIT = 8


def soft_labels(labels: Array, num_classes: int, smoothing: float) -> Array:
    """Returns smoothed label distributions: (B,) integers -> (B, num_classes).

    The label gets 1 - smoothing, and `smoothing` is spread evenly over all classes, the label's
    included (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


class Box(NamedTuple):
    """One rectangle of pixels for each image: rows top <= y < bottom, columns left <= x < right.

    All four arrays are (B,) int32.
    """

    top: Array
    bottom: Array
    left: Array
    right: Array

    def area(self) -> Array:
        """Returns the areas in pixels, (B,) int32."""
        return (self.bottom - self.top) * (self.right - self.left)

    def mask(self, height: int, width: int) -> Array:
        """Returns (B, height, width, 1) bool, true inside the boxes."""
        top, bottom, left, right = (edge[:, None] for edge in self)
        y, x = jnp.arange(height), jnp.arange(width)
        rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
        return (rows[:, :, None] & columns[:, None, :])[..., None]


def random_erase(images: Array, key: Array, *, prob: float, mode: str) -> Array:
    """Random erasing: replaces one rectangle of an image, drawn separately for every image.

    Args:
      images: (B, height, width, channels) float32, normalised.
      key: random key of this batch.
      prob: probability that a rectangle of an image is erased; 0 is off.
      mode: what replaces the rectangle. "pixel": N(0, 1) for every value; "rand": one colour from
        N(0, 1) for the rectangle; "const": 0, the mean of the data.

    Returns:
      The erased images, with the same shape and type.
    """
    if prob == 0:
        return images
    batch, height, width, channels = images.shape
    box_key, noise_key = jax.random.split(key)
    inside = _erase_box(box_key, batch, height, width, prob).mask(height, width)
    if mode == "const":
        noise: Array | float = 0.0
    else:
        shape = images.shape if mode == "pixel" else (batch, 1, 1, channels)
        noise = jax.random.normal(noise_key, shape)
    return jnp.where(inside, noise, images)


def _erase_box(key: Array, batch: int, height: int, width: int, prob: float) -> Box:
    """Draws (B,) boxes; a box is empty with probability 1 - prob, and if no try fits."""
    # One call draws all numbers, because every call takes time to compile.
    draws = jax.random.uniform(key, (batch, 3 + 2 * _ERASE_TRIES))
    apply, y, x, tries = draws[:, 0] < prob, draws[:, 1], draws[:, 2], draws[:, 3:]
    area = _between(*_ERASE_AREA, tries[:, :_ERASE_TRIES])
    log_aspect = _between(
        math.log(_ERASE_ASPECT[0]), math.log(_ERASE_ASPECT[1]), tries[:, _ERASE_TRIES:]
    )
    box_height, box_width = erase_size(area, log_aspect, height, width)
    box_height = jnp.where(apply, box_height, 0)
    top, left = _integer(y, height - box_height + 1), _integer(x, width - box_width + 1)
    return Box(top, top + box_height, left, left + box_width)


def _between(low: float, high: float, uniform: Array) -> Array:
    return low + (high - low) * uniform


def _integer(uniform: Array, count: Array | int) -> Array:
    """Maps [0, 1) to the integers 0, 1, ..., count - 1.

    The result is never `count`: a float32 draw is at most 1 - 2^-23, and its product with an
    integer rounds to less than that integer.
    """
    return (uniform * count).astype(jnp.int32)


def erase_size(area: Array, log_aspect: Array, height: int, width: int) -> tuple[Array, Array]:
    """Returns the size of the first of several boxes that is smaller than the image both ways.

    Args:
      area: (B, tries), share of the image's area.
      log_aspect: (B, tries), log(height / width) of the box.
      height, width: size of the image in pixels.

    Returns:
      Height and width of the box in pixels, each (B,) int32; both are 0 if no try fits.
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
    group i mod G. Every group draws four things: whether it is mixed, by which of the two methods,
    one lambda and one box. So the copies of an image that repeated augmentation puts in a row are
    mixed with different random numbers. This is as in DeiT: its sampler sends the copies to
    different GPUs, and every GPU draws once for its batch.

    Images are mixed in pairs, see `partner`.

    Args:
      images: (B, height, width, channels) float32.
      labels: (B, num_classes) float32, distributions.
      key: random key of this batch.
      mixup: alpha of lambda ~ Beta(alpha, alpha), where lambda is the weight of the image itself;
        0 is off.
      cutmix: alpha of lambda ~ Beta(alpha, alpha), where lambda is the share of the image that
        stays, before the box is clipped; 0 is off.
      prob: probability that a group is mixed at all.
      switch_prob: probability that a group is mixed by CutMix, if both are on.
      group_size: images of a group; there are B / group_size groups, rounded up.

    Returns:
      The mixed images and labels, with the same shapes and types. CutMix weights the labels by the
      numbers of pixels inside and outside the clipped box.
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

    # Every device draws the few numbers of all groups and looks up its own. Beta is drawn by
    # rejection, so sharded draws would make all devices communicate after every round.
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
    """Returns CutMix boxes around the pixels (y, x), clipped to the image: timm's rand_bbox.

    Before clipping, a box has the image's aspect ratio and 1 - lambda of its area.

    Args:
      lam: (B,) float32, lambda.
      y, x: (B,) int32, centres of the boxes in pixels.
      height, width: size of the image in pixels.
    """
    side = jnp.sqrt(1 - lam)
    cut_height, cut_width = (height * side).astype(jnp.int32), (width * side).astype(jnp.int32)
    return Box(
        jnp.maximum(y - cut_height // 2, 0),
        jnp.minimum(y + (cut_height + 1) // 2, height),
        jnp.maximum(x - cut_width // 2, 0),
        jnp.minimum(x + (cut_width + 1) // 2, width),
    )


def _blend(x: Array, share: Array) -> Array:
    """Returns share * x + (1 - share) * partner(x), row by row; exact for shares of 0 and 1."""
    return x * share + partner(x) * (1 - share)


def partner(x: Array) -> Array:
    """Returns the rows that the rows of x are mixed with: (B, ...) -> (B, ...).

    The partner of row i is row 8 (i // 8) + (i + 4) % 8, which is near and so on the same device.
    If 8 does not divide B, it is row (i + B // 2) % B. Two rows are each other's partners, except
    if B is odd.
    """
    batch = x.shape[0]
    if batch % _UNIT:
        return jnp.roll(x, -(batch // 2), axis=0)
    halves = x.reshape(batch // _UNIT, 2, _UNIT // 2, *x.shape[1:])
    return jnp.flip(halves, axis=1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class BatchAugmentation:
    """Augments a batch from the host for training: normalises, erases, smooths labels and mixes.

    A call takes the whole global batch, because groups and partners are counted from its first
    image: images (B, height, width, channels) uint8, labels (B,) integers, and a random key that
    must not be used again. It returns images of the same shape and labels (B, num_classes), both
    float32.

    Attributes:
      num_classes: number of classes.
      mean, std: mean and standard deviation of each channel, see `normalise`.
      smoothing: see `soft_labels`.
      erase_prob, erase_mode: `prob` and `mode` of `random_erase`.
      mixup, cutmix, prob, switch_prob, group_size: see `mix`.

    Raises:
      ValueError: if a value is out of its range; the message names the configuration key.
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
