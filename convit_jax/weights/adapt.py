"""Fitting parameters to another model: a new head, another image size, other input channels.

Shapes: D width.
"""

from collections.abc import Mapping
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.model.network import ConViT

log = logging.getLogger(__name__)


def fit_params(
    params: Mapping[str, Any],
    model: ConViT,
    *,
    new_head: bool,
    resize_pos_embed: bool,
    adapt_channels: bool,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Fits loaded parameters to a model and logs each change.

    Makes no changes except those that the arguments allow.

    Args:
      params: nested dictionary of arrays.
      model: the model that will use the parameters.
      new_head: whether to replace the head by a newly initialised one. If the model has no head,
        the head is dropped.
      resize_pos_embed: whether the position embedding may be interpolated to the model's grid.
      adapt_channels: whether the first convolution may be fitted to the model's input channels.
      seed: seed of the new head's initialisation.
      grid: rows and columns of the patch grid of `params`; None means a square.

    Returns:
      The fitted parameters, a new nested dictionary.

    Raises:
      ValueError: names every parameter whose shape is not the model's.
    """
    params = dict(params)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    shapes = shapes["params"]
    if new_head:
        _replace_head(params, shapes, model, seed)
    if resize_pos_embed and "pos_embed" in params and "pos_embed" in shapes:
        before = params["pos_embed"]
        params["pos_embed"] = resample_pos_embed(before, model.grid, int(model.cls_pos_embed), grid)
        if params["pos_embed"] is not before:
            tokens = before.shape[1], params["pos_embed"].shape[1]
            log.info(
                "position embedding interpolated from %d to %d tokens, a grid of %d x %d",
                *tokens, *model.grid,
            )  # fmt: skip
    if adapt_channels:
        kernel = params["patch_embed"]["kernel"]
        adapted = adapt_input_conv(kernel, model.in_channels)
        if adapted is not kernel:
            params["patch_embed"] = {**params["patch_embed"], "kernel": adapted}
            log.info(
                "first convolution adapted from %d to %d input channels",
                kernel.shape[2], model.in_channels,
            )  # fmt: skip
    _check_shapes(params, shapes)
    return params


def _replace_head(params: dict[str, Any], shapes: dict[str, Any], model: ConViT, seed: int) -> None:
    if "head" in shapes:
        # The initialisation of ConViT's head: weights from N(0, 0.02^2), biases 0.
        kernel = np.random.default_rng(seed).normal(0, 0.02, shapes["head"]["kernel"].shape)
        params["head"] = {
            "kernel": kernel.astype(np.float32),
            "bias": np.zeros(shapes["head"]["bias"].shape, np.float32),
        }
        log.info("new head for %d classes", model.num_classes)
    elif params.pop("head", None) is not None:
        log.info("the head is left out: the model returns features")


def resample_pos_embed(
    pos_embed: np.ndarray,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    source_grid: tuple[int, int] | None = None,
) -> np.ndarray:
    """Interpolates a position embedding to another grid, as timm's resample_abs_pos_embed does.

    The interpolation is bicubic with antialiasing. Tokens in front of the patches keep their
    embeddings.

    Args:
      pos_embed: (1, tokens, D).
      grid: (rows, columns) of the result.
      num_prefix_tokens: number of tokens in front of the patches.
      source_grid: (rows, columns) of `pos_embed`; None means a square.

    Returns:
      (1, num_prefix_tokens + rows * columns, D), or `pos_embed` itself if it has that grid already.

    Raises:
      ValueError: if `pos_embed` does not have the patches of `source_grid`.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    rows, columns = (side, side) if source_grid is None else source_grid
    if rows * columns != patches.shape[1]:
        raise ValueError(
            f"pos_embed: expected a grid of {rows} x {columns} patches, got "
            f"{patches.shape[1]} patches"
        )
    if (rows, columns) == tuple(grid):
        return pos_embed
    width = patches.shape[2]
    resized = jax.image.resize(
        patches.reshape(1, rows, columns, width), (1, *grid, width), "bicubic", antialias=True
    )
    return np.concatenate([prefix, np.asarray(resized).reshape(1, -1, width)], axis=1)


def adapt_input_conv(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """Fits the first convolution to another number of channels, as timm's adapt_input_conv does.

    For one channel, the kernel is summed over its channels, so a grey image has the output that
    its RGB copy had. For more channels, the kernels of red, green and blue are repeated in turn
    and scaled by 3 / in_channels.

    Args:
      kernel: (height, width, channels, D).
      in_channels: number of channels of the result.

    Returns:
      (height, width, in_channels, D), or `kernel` itself if it has that many channels already.

    Raises:
      ValueError: if `in_channels` is neither 1 nor the kernel's number of channels, and the kernel
        does not have 3 channels.
    """
    channels = kernel.shape[2]
    if in_channels == channels:
        return kernel
    if in_channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if channels != 3:
        raise ValueError(
            f"in_channels: expected weights of 3 input channels to make {in_channels} from, got "
            f"{channels}"
        )
    return kernel[:, :, np.arange(in_channels) % 3] * np.float32(3 / in_channels)


def _check_shapes(params: dict[str, Any], shapes: dict[str, Any]) -> None:
    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    found, expected = flat(params), flat(shapes)
    problems = [
        f"{name}: expected {expected.get(name, 'nothing')}, got {found.get(name, 'nothing')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if problems:
        raise ValueError(
            "the weights do not fit the model (config.init_new_head, config.init_resize_pos_embed "
            "and config.init_adapt_channels allow for other classes, sizes and input channels):\n  "
            + "\n  ".join(problems)
        )
