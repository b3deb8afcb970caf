"""Parameters fitted to another model: a new head, other image sizes, other input channels."""

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
    """Fits loaded parameters to a model, by the named changes only; each is logged.

    Args:
      params: nested dictionary of arrays.
      model: to be initialised with them.
      new_head: whether the head starts anew, as for other classes, or is left out where the model
        has none.
      resize_pos_embed: whether the position embedding may be interpolated to the model's grid.
      adapt_channels: whether the first convolution may be fitted to the model's input channels.
      seed: of the new head.
      grid: rows and columns of patches that `params` were made for; None: a square.

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
        # N(0, 0.02^2) and zero, as in ConViT.
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
    """Interpolates a position embedding to another grid, as timm's resample_abs_pos_embed.

    Bicubic, antialiased; tokens in front of the patches keep theirs.

    Args:
      pos_embed: (1, tokens, D).
      grid: (rows, columns) wanted.
      num_prefix_tokens: tokens in front of the patches.
      source_grid: (rows, columns) of `pos_embed`; None: a square.

    Returns:
      (1, num_prefix_tokens + rows * columns, D); `pos_embed` itself if it has the grid already.
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
    """The first convolution for other input channels, as timm's adapt_input_conv.

    For one channel, the sum over the channels: a grey image gives what it gave as RGB. For more,
    red, green and blue in turn, scaled by 3 / in_channels.

    Args:
      kernel: (height, width, channels, D).
      in_channels: wanted.

    Raises:
      ValueError: if the channels are neither 3 nor what is wanted, and more than one is wanted.
    """
    channels = kernel.shape[2]
    if in_channels == channels:
        return kernel
    if in_channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if channels != 3:
        raise ValueError(
            f"in_channels: expected weights of 3 input channels to make {in_channels} of, got "
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
