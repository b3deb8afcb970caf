"""How far attention reaches: the measures of section 4 of the paper.

The non-locality of an attention map is the mean distance, in patches, from a query to the keys that
it attends to (equation 8, figure 5). The gates say how much of a head's attention is positional
(figure 6). Figure 7 shows the attention of one query patch.

Plain layers have a class token. It has no place on the grid, so it is left out, as a query and as a
key. The rows that remain are divided by their sums, so that they are distributions over patches.

Shapes: B images, H heads, L layers, G GPSA layers, N patches, Q query patches, R and C rows and
columns of patches.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from convit_jax.model.network import ConViT
from convit_jax.model.positional import Grid

Array = jax.Array

# The map that averages the values (equation 7), and its two parts.
PARTS = ("blended", "content", "positional")


def gates(params: Mapping[str, Any]) -> Array:
    """Returns the share of the positional attention in each head: s(g) of equation 7, (G, H).

    Args:
      params: parameters of a ConViT; those of a DeiT have no gates, and G and H are 0.
    """
    if "gpsa_blocks" not in params:
        return jnp.zeros((0, 0))
    return jax.nn.sigmoid(jnp.asarray(params["gpsa_blocks"]["attn"]["gate"], jnp.float32))


def distances(grid: Grid) -> Array:
    """Returns |r_ij|, the distance between the centres of any two patches in patches, (N, N)."""
    rows, columns = grid
    y, x = jnp.divmod(jnp.arange(rows * columns), columns)
    dy, dx = (jnp.float32(along[None, :] - along[:, None]) for along in (y, x))
    return jnp.sqrt(dy**2 + dx**2)


def over_patches(attention: Array, patches: int) -> Array:
    """Returns an attention map over the patches alone.

    Args:
      attention: (..., N, N), or (..., 1 + N, 1 + N) with the class token first.
      patches: N.

    Returns:
      (..., N, N). If there was a class token, every row was divided by its sum.

    Raises:
      ValueError: if the map has another shape.
    """
    if attention.shape[-2:] == (patches, patches):
        return attention
    if attention.shape[-2:] != (1 + patches, 1 + patches):
        raise ValueError(
            f"attention map: expected {patches} queries and keys, or one more with a class token, "
            f"got {attention.shape[-2:]}"
        )
    attention = attention[..., 1:, 1:]
    # A patch that attends to the class token alone has a row of zeros, and keeps it.
    sums = attention.sum(axis=-1, keepdims=True)
    return attention / jnp.maximum(sums, jnp.finfo(jnp.float32).tiny)


def reach(attention: Array, grid: Grid) -> Array:
    """Returns the non-locality of attention maps, (1 / N) sum_ij A_ij |r_ij| (equation 8).

    Args:
      attention: (..., N, N), or (..., 1 + N, 1 + N) with the class token first.
      grid: (R, C).

    Returns:
      (...), in patches.
    """
    attention = over_patches(attention, grid[0] * grid[1])
    return (attention * distances(grid)).sum(axis=-1).mean(axis=-1)


def reach_of_layers(maps: Mapping[str, Array], grid: Grid) -> dict[str, Array]:
    """Returns the non-locality of the maps of one layer, or of a group of layers.

    Args:
      maps: maps of `GPSA` or of `SelfAttention`, with any leading axes.
      grid: (R, C).

    Returns:
      "blended", of the maps that average the values, and "content"; in a plain layer they are the
      same. Of GPSA also "positional". The axes of queries and keys are gone.
    """
    return _each_map(maps, functools.partial(reach, grid=grid))


def nonlocality(maps: Mapping[str, Mapping[str, Array]], grid: Grid) -> dict[str, Array]:
    """Returns the non-locality of every head (equation 8), in patches, as the mean over the images.

    `image_nonlocality` computes the same of each image, without the maps in memory.

    Args:
      maps: the maps of a model, from `model.apply(variables, images, return_attention=True)`.
      grid: (R, C), rows and columns of the images' patches.

    Returns:
      "blended" (L, H), of the maps that average the values; "content" (L, H), of their content
      part, which is the same in plain layers; "positional" (G, H), of the positional part, left
      out for a DeiT. The non-locality of a layer is the mean over its heads.
    """
    found = _of_all_layers({name: reach_of_layers(group, grid) for name, group in maps.items()})
    return {name: x if name == "positional" else x.mean(axis=1) for name, x in found.items()}


def image_nonlocality(
    model: ConViT, variables: Mapping[str, Any], images: Array
) -> dict[str, Array]:
    """Returns the non-locality of every head (equation 8), in patches, for each image.

    Every layer's maps come from its own input, and are reduced before the next layer's are made.

    Args:
      model: a ConViT or DeiT.
      variables: {"params": parameters of the model}.
      images: (B, height, width, channels), normalised, floating point.

    Returns:
      "blended" (L, B, H), "content" (L, B, H) and "positional" (G, H), as `nonlocality` has them.

    Raises:
      ValueError: if the images do not have the shape that the model was made for.
    """
    grid = model.grid_of((images.shape[1], images.shape[2]))
    measure = functools.partial(reach_of_layers, grid=grid)
    found = model.apply(variables, images, return_attention=measure)
    return _of_all_layers(cast(tuple[Any, dict[str, dict[str, Array]]], found)[1])


def query_attention(
    model: ConViT, variables: Mapping[str, Any], images: Array, queries: Sequence[tuple[int, int]]
) -> dict[str, Array]:
    """Returns the attention of some query patches to all patches (figure 7).

    Args:
      model: a ConViT or DeiT.
      variables: {"params": parameters of the model}.
      images: (B, height, width, channels), normalised, floating point.
      queries: row and column of each query patch, counted from 0.

    Returns:
      "blended" (L, B, H, Q, R, C), of the maps that average the values; "content" (L, B, H, Q, R,
      C), of their content part, which is the same in plain layers; "positional" (G, H, Q, R, C),
      left out for a DeiT. The sum over the patches is 1.

    Raises:
      ValueError: if the images do not have the shape that the model was made for, or a query is
        outside of the grid.
    """
    grid = rows, columns = model.grid_of((images.shape[1], images.shape[2]))
    for row, column in queries:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"query: expected a row of 0 to {rows - 1} and a column of 0 to {columns - 1}, got "
                f"{row},{column}"
            )
    places = jnp.asarray([row * columns + column for row, column in queries])

    def chosen(attention: Array) -> Array:
        seen = over_patches(attention, rows * columns)[..., places, :]
        return seen.reshape(*seen.shape[:-1], *grid)

    measure = functools.partial(_each_map, function=chosen)
    found = model.apply(variables, images, return_attention=measure)
    return _of_all_layers(cast(tuple[Any, dict[str, dict[str, Array]]], found)[1])


def _each_map(maps: Mapping[str, Array], function: Callable[[Array], Array]) -> dict[str, Array]:
    """Applies a function to each map of a layer; a plain layer's content map is its blended one."""
    found = {name: function(maps[name]) for name in PARTS if name in maps}
    return {"blended": found["content"], **found}


def _of_all_layers(groups: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Joins the layers of both groups of a model in their order; plain ones are not positional."""
    found: dict[str, list[Array]] = {}
    for group in ("gpsa_blocks", "blocks"):
        for name, array in groups.get(group, {}).items():
            found.setdefault(name, []).append(array)
    return {name: jnp.concatenate(arrays) for name, arrays in found.items()}
