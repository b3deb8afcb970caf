"""ConViT (d'Ascoli et al., ICML 2021) in JAX and Flax linen.

    model = create_model("convit_tiny", num_classes=10)
    variables = model.init(jax.random.key(0), images)     # images (B, 224, 224, 3)
    logits = model.apply(variables, images)               # (B, 10) float32

Importing this package imports jax, flax and numpy, and nothing else.
"""

from convit_jax.attention import GPSA, SelfAttention
from convit_jax.convert import from_torch, to_torch
from convit_jax.model import VARIANTS, ConViT, create_model

__all__ = [
    "GPSA",
    "VARIANTS",
    "ConViT",
    "SelfAttention",
    "create_model",
    "from_torch",
    "to_torch",
]
