"""Weights in and out of files, and fitted to another model.

Files hold PyTorch's names and layouts (see `convit_jax.convert`), so timm reads what is written
here: `model.load_state_dict(safetensors.torch.load_file("weights.safetensors"))`.
"""

from collections.abc import Mapping
import logging
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.convert import from_torch, to_torch
from convit_jax.model import ConViT

log = logging.getLogger(__name__)


def save_weights(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
    """Writes parameters as safetensors under PyTorch's names; whole, or not at all."""
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    unfinished = path.with_name(path.name + ".part")
    save_file(to_torch(params), unfinished)
    unfinished.replace(path)


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the parameters of a ConViT or DeiT.

    Args:
      path: .safetensors, or PyTorch's .pth or .pt (needs torch): a state dict, or a training
        checkpoint with one under "model".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of another kind, or not the weights of a ConViT or DeiT.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            state_dict = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    elif path.suffix in (".pth", ".pt"):
        state_dict = _load_torch(path)
    else:
        raise ValueError(f"weights: expected a .safetensors, .pth or .pt file, got {path}")
    try:
        return from_torch(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_torch(path: pathlib.Path) -> Mapping[str, Any]:
    import argparse
    import pickle

    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: reading it needs torch: pip install torch, or convert it to .safetensors"
        ) from None
    try:
        # Data only: a pickle that would run code is refused. The original's checkpoints hold
        # their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable PyTorch file: {error}") from error
    return loaded.get("model", loaded)


def fit_params(
    params: dict[str, Any], model: ConViT, *, new_head: bool, resize_pos_embed: bool, seed: int
) -> dict[str, Any]:
    """Fits loaded parameters to a model, by the named changes only.

    Args:
      params: of `load_weights`.
      model: to be initialised with them.
      new_head: whether the head starts anew, as for other classes.
      resize_pos_embed: whether the position embedding may be interpolated to the model's grid.
      seed: of the new head.

    Raises:
      ValueError: names every parameter whose shape is not the model's.
    """
    params = dict(params)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    shapes = shapes["params"]
    if new_head and "head" in shapes:
        # N(0, 0.02^2) and zero, as in ConViT.
        kernel = np.random.default_rng(seed).normal(0, 0.02, shapes["head"]["kernel"].shape)
        params["head"] = {
            "kernel": kernel.astype(np.float32),
            "bias": np.zeros(shapes["head"]["bias"].shape, np.float32),
        }
        log.info("new head for %d classes", model.num_classes)
    if resize_pos_embed and "pos_embed" in params and "pos_embed" in shapes:
        tokens, wanted = params["pos_embed"].shape[1], shapes["pos_embed"].shape[1]
        params["pos_embed"] = resample_pos_embed(
            params["pos_embed"], model.grid, num_prefix_tokens=int(model.cls_pos_embed)
        )
        if tokens != wanted:
            log.info("position embedding interpolated from %d to %d tokens", tokens, wanted)
    _check_shapes(params, shapes)
    return params


def resample_pos_embed(
    pos_embed: np.ndarray, grid: tuple[int, int], num_prefix_tokens: int = 0
) -> np.ndarray:
    """Interpolates a position embedding to another grid, as timm's resample_abs_pos_embed.

    Bicubic, antialiased; tokens in front of the patches keep theirs.

    Args:
      pos_embed: (1, tokens, D), of a square grid.
      grid: (rows, columns) wanted.
      num_prefix_tokens: tokens in front of the patches.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"pos_embed: expected a square grid of patches, got {patches.shape[1]}")
    if (side, side) == tuple(grid):
        return pos_embed
    width = patches.shape[2]
    resized = jax.image.resize(
        patches.reshape(1, side, side, width), (1, *grid, width), "bicubic", antialias=True
    )
    return np.concatenate([prefix, np.asarray(resized).reshape(1, -1, width)], axis=1)


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
            "the weights do not fit the model (config.init_new_head and "
            "config.init_resize_pos_embed allow for other classes and sizes):\n  "
            + "\n  ".join(problems)
        )
