"""Parameters without position or content, for Tables 5 and 6 of the paper.

Table 5 takes the position embedding away. Table 6 takes the content part or the positional part of
the attention away in the first GPSA layers: the gates of equation 7 become 1 or 0.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

Params = Mapping[str, Any]

_OPEN = 1e3  # a gate whose sigmoid is exactly 1 in float32, and that of -_OPEN exactly 0


def default_layers(gpsa_layers: int) -> tuple[int, ...]:
    """Returns how many first layers to mask: 3, 5 and 10 of 10, as in Table 6, or in proportion."""
    shares = (0.3, 0.5, 1) if gpsa_layers else ()
    return tuple(sorted({max(1, round(gpsa_layers * share)) for share in shares}))


def without_position_embedding(params: Params) -> dict[str, Any]:
    """Returns parameters whose position embedding is 0 (Table 5); other arrays are not copied.

    A DeiT's class token loses its position embedding too.

    Raises:
      ValueError: if there is no position embedding.
    """
    if "pos_embed" not in params:
        raise ValueError("position embedding: expected weights with one (pos_embed), got none")
    return {**params, "pos_embed": jnp.zeros_like(params["pos_embed"])}


def without_content(params: Params, layers: int) -> dict[str, Any]:
    """Returns parameters whose first GPSA layers attend by position alone (Table 6).

    Args:
      params: parameters of a ConViT; other arrays than the gates are not copied.
      layers: number of GPSA layers to mask, counted from the input.

    Raises:
      ValueError: if the model has fewer GPSA layers.
    """
    return _with_gates(params, layers, _OPEN)


def without_position(params: Params, layers: int) -> dict[str, Any]:
    """Returns parameters whose first GPSA layers attend by content alone (Table 6).

    Takes the arguments of `without_content`, and raises its errors.
    """
    return _with_gates(params, layers, -_OPEN)


def _with_gates(params: Params, layers: int, gate: float) -> dict[str, Any]:
    count = len(params["gpsa_blocks"]["attn"]["gate"]) if "gpsa_blocks" in params else 0
    if not 1 <= layers <= count:
        raise ValueError(f"masked layers: expected 1 to the {count} GPSA layers, got {layers}")
    blocks = params["gpsa_blocks"]
    gates = jnp.asarray(blocks["attn"]["gate"]).at[:layers].set(gate)
    return {**params, "gpsa_blocks": {**blocks, "attn": {**blocks["attn"], "gate": gates}}}
