"""ConViT (d'Ascoli et al., ICML 2021) in JAX and Flax linen.

    model = create_model("convit_tiny", num_classes=10)
    variables = model.init(jax.random.key(0), images)     # images (B, 224, 224, 3)
    logits = model.apply(variables, images)               # (B, 10) float32

    model, variables = load("convit_base")                # or a file .pth, .safetensors, a workdir

Importing this package imports jax, flax and numpy, and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from convit_jax.attention import GPSA, SelfAttention
from convit_jax.model import VARIANTS, ConViT, create_model

if TYPE_CHECKING:
    from convit_jax.convert import from_torch, to_torch
    from convit_jax.weights import load

__all__ = [
    "GPSA",
    "VARIANTS",
    "ConViT",
    "SelfAttention",
    "create_model",
    "from_torch",
    "load",
    "to_torch",
]

# Imported when asked for; convert is a command too, which Python runs as a module of its own.
_LAZY = {"from_torch": "convert", "to_torch": "convert", "load": "weights"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
