"""What the attention of a model looks at, and what its logits gain by it.

Shapes: B batch, H heads, L layers with a class token, G GPSA layers, N patches, R and C rows and
columns of patches.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from convit_jax.model.network import ConViT

Array = jax.Array


def class_attention(
    model: ConViT, variables: Mapping[str, Any], images: Array
) -> tuple[Array, Array]:
    """Returns the attention of the class token to each patch, and the gates of the GPSA layers.

    A ConViT of the paper has a class token in its last two layers. Its other layers are GPSA
    layers, where no single map stands for the image. A DeiT has a class token in all layers.
    Under `jax.jit` the maps of GPSA layers take no memory.

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
    gates = maps["gpsa_blocks"]["gate"] if "gpsa_blocks" in maps else jnp.zeros((0, heads))
    return patches.reshape(layers, batch, heads, *grid), gates


def attention_gradients(
    model: ConViT,
    variables: Mapping[str, Any],
    images: Array,
    score: Callable[[Array], Array],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the attention map of each layer, and the gradient of a score with respect to it.

    The maps are those that average the values: in GPSA layers the blended maps of equation 7. With
    both, LeGrad, Transformer-MM-Explainability (Chefer et al. 2021, arXiv:2103.15679) and other
    methods of explanation are a few lines. One forward and one backward pass compute all layers.

    Args:
      model: the model, whose `attention` and `positional` play no role here.
      variables: {"params": parameters of the model}.
      images: (B, height, width, in_channels), normalised, floating point.
      score: function of the logits that returns a scalar. For a sum over images, such as
        `lambda logits: logits[:, 7].sum()`, each image has the gradient of its own term.

    Returns:
      Maps and gradients, both {"gpsa_blocks": (G, B, H, N, N), "blocks": (L, B, H, 1 + N, 1 + N)}
      float32, indexed [layer, image, head, query, key]. "gpsa_blocks" is left out for a DeiT.

    Raises:
      ValueError: if the images do not have the shape that the model was made for.
    """

    def maps_of(offsets: dict[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        found = model.apply(variables, images, return_attention=True, attention_offsets=offsets)
        logits, maps = cast(tuple[Array, dict[str, dict[str, Array]]], found)
        used = {group: of.get("blended", of["content"]) for group, of in maps.items()}
        return score(logits), used

    _, shapes = jax.eval_shape(maps_of, None)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    gradients, maps = jax.grad(maps_of, has_aux=True)(zeros)
    return maps, gradients
