"""The ablations of the paper as changes of a configuration: Table 3, rows a to g.

The rows differ in four things: training of the gates, convolutional initialisation, training of the
GPSA layers, GPSA itself. No code for them was published. Two readings are this project's own:

- "Gating frozen at 0" sets the gate parameters g_h to 0. So content and position have the weights
  1 - sigmoid(0) and sigmoid(0), a half each.
- "GPSA not trained" freezes the weights of the positional attention. `optim.freeze=gpsa` freezes
  all weights of these attention layers instead.
"""

from typing import Any

import ml_collections

_GATES_AT_0 = {"model.gate_init": 0.0, "optim.freeze": "gates"}
_FROZEN = {"model.gate_init": 0.0, "optim.freeze": "gates,positional"}
_RANDOM_INIT = {"model.use_local_init": False}

# The keys in which each row differs from the configuration of a ConViT. Row e is a DeiT with the
# same heads, width and depth.
TABLE_3: dict[str, dict[str, Any]] = {
    "a": {},
    "b": _GATES_AT_0,
    "c": _RANDOM_INIT,
    "d": _GATES_AT_0 | _RANDOM_INIT,
    "e": {"model.local_up_to_layer": 0, "model.cls_pos_embed": True, "model.qkv_bias": True},
    "f": _FROZEN,
    "g": _FROZEN | _RANDOM_INIT,
}


def apply(config: ml_collections.ConfigDict, row: str) -> None:
    """Changes the configuration of a ConViT into that of a row of Table 3.

    Args:
      config: the configuration, see `convit_jax.recipe`; changed.
      row: "a" to "g".

    Raises:
      ValueError: if the table has no such row.
    """
    if row not in TABLE_3:
        raise ValueError(f"Table 3: expected one of the rows {', '.join(TABLE_3)}, got {row!r}")
    config.update_from_flattened_dict(TABLE_3[row])
