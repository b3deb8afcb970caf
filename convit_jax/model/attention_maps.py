"""What the attention of a model looks at: the class token's maps over an image.

Shapes: B batch, H heads, L layers with a class token, G GPSA layers, R and C rows and columns of
patches.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax

from convit_jax.model.network import ConViT

Array = jax.Array


def class_attention(
    model: ConViT, variables: Mapping[str, Any], images: Array
) -> tuple[Array, Array]:
    """Returns the attention of the class token to each patch, and the gates of the GPSA layers.

    A ConViT of the paper has a class token in its last two layers. Its other layers are GPSA
    layers, where no single map stands for the image. A DeiT has a class token in all layers.

    Args:
      model: a ConViT or DeiT, with any `global_pool` and with or without a head.
      variables: {"params": parameters of the model}.
      images: (B, height, width, in_channels), normalised, floating point.

    Returns:
      Maps (L, B, H, R, C) and gates (G, H), float32. The sum over a map's patches is less than 1:
      the rest is the class token's attention to itself. A gate is the share of the positional
      attention in a head, between 0 and 1. G is 0 for a DeiT.

    Raises:
      ValueError: if the images do not have the shape that the model was made for.
    """
    found = model.apply(variables, images, return_attention=True)
    _, maps = cast(tuple[Array, dict[str, dict[str, Array]]], found)
    content = maps["blocks"]["content"]  # (L, B, H, 1 + N, 1 + N), the class token first
    layers, batch, heads, *_ = content.shape
    patches = content[:, :, :, 0, 1:]
    grid = model.grid_of((images.shape[1], images.shape[2]))
    gates = maps["gpsa_blocks"]["gate"] if "gpsa_blocks" in maps else jax.numpy.zeros((0, heads))
    return patches.reshape(layers, batch, heads, *grid), gates
