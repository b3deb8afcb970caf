"""timm and PyTorch, the peers that tests and benchmarks compare with."""

from types import ModuleType
from typing import Any

from convit_jax import VARIANTS, ConViT, create_model

# timm registers no DeiT of the "+" sizes.
NAMES = tuple(n for n in VARIANTS if n.startswith("convit") or not n.endswith("_plus"))


def import_timm() -> tuple[ModuleType, ModuleType]:
    """Returns (timm, torch).

    Raises:
      ImportError: if they are not installed (pip install '.[torch]').
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # The CPU build of torch beside a torchvision wheel that finds no CUDA libraries: its
        # operators are not loaded and registering their shapes fails. timm needs none of them.
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
    import timm

    return timm, torch


def make(name: str):
    """timm's model of one of `NAMES`, in evaluation mode, with timm's own initialisation."""
    timm, _ = import_timm()
    if name.startswith("deit"):
        return timm.create_model(f"{name}_patch16_224").eval()
    return like(create_model(name))


def like(model: ConViT, **options: Any):
    """timm's model of the sizes of one of ours, with timm's own initialisation.

    timm registers three of the ConViTs, and none at another width or image size.

    Args:
      model: a ConViT, or a DeiT (`local_up_to_layer=0`, for which timm has its VisionTransformer).
      **options: of timm's class, in place of its defaults.

    Raises:
      ValueError: if timm's class cannot be such a model.
    """
    import_timm()
    from timm.models.convit import ConVit
    from timm.models.vision_transformer import VisionTransformer

    height, width, channels = model.image_shape
    sizes = {
        "img_size": (height, width),
        "patch_size": model.patch_size,
        "in_chans": channels,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "qkv_bias": model.qkv_bias,
    }
    if model.cls_pos_embed:
        return VisionTransformer(**sizes | options).eval()
    if model.grid[0] != model.grid[1]:
        raise ValueError(f"timm's ConViT takes square images only, not {height} x {width}")
    # It takes the width of a head for embed_dim.
    sizes["embed_dim"] //= model.num_heads
    sizes["local_up_to_layer"] = model.local_up_to_layer
    return ConVit(**sizes | options).eval()
