"""ConViT (d'Ascoli et al., ICML 2021) in JAX and Flax linen.

    model = create_model("convit_tiny", num_classes=10)
    variables = model.init(jax.random.key(0), images)     # images (B, 224, 224, 3)
    logits = model.apply(variables, images)               # (B, 10) float32

    model, variables = load("convit_base")                # or a .pth, .safetensors, a workdir

`import convit_jax` loads no other package. The first use of a name loads jax, flax and numpy, and
nothing more unless it reads weights. Worker processes that read images do without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convit_jax.model.attention import GPSA, SelfAttention
    from convit_jax.model.attention_maps import attention_gradients, class_attention
    from convit_jax.model.network import ConViT
    from convit_jax.model.variants import VARIANTS, create_model
    from convit_jax.weights.load import load
    from convit_jax.weights.state_dict import from_torch, to_torch

__version__ = "0.2.0"

__all__ = [
    "GPSA",
    "VARIANTS",
    "ConViT",
    "SelfAttention",
    "attention_gradients",
    "class_attention",
    "create_model",
    "from_torch",
    "load",
    "to_torch",
]

# The module of each name, imported when the name is first used.
_MODULES = {
    "GPSA": "model.attention",
    "SelfAttention": "model.attention",
    "attention_gradients": "model.attention_maps",
    "class_attention": "model.attention_maps",
    "ConViT": "model.network",
    "VARIANTS": "model.variants",
    "create_model": "model.variants",
    "from_torch": "weights.state_dict",
    "to_torch": "weights.state_dict",
    "load": "weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
