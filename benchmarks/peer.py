"""timm and PyTorch, the peers that tests and benchmarks compare with."""

from types import ModuleType
from typing import Any

from convit_jax import VARIANTS, ConViT, create_model

# timm has no DeiT of the "+" sizes.
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
        # torchvision was built for CUDA and torch for CPUs, so torchvision's operators are not
        # loaded, and registering their shapes fails. timm needs none of them: define empty ones.
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
    import timm

    return timm, torch


def make(name: str):
    """Returns timm's model of that name, in evaluation mode, with timm's own initialisation.

    Args:
      name: one of `NAMES`.
    """
    timm, _ = import_timm()
    if name.startswith("deit"):
        return timm.create_model(f"{name}_patch16_224").eval()
    return like(create_model(name))


def like(model: ConViT, **options: Any):
    """Returns timm's model with the sizes of one of ours, with timm's own initialisation.

    It is made from timm's classes, because timm names only three of the ConViTs, and none with
    another width or image size.

    Args:
      model: a ConViT, or a DeiT (`local_up_to_layer=0`), which is timm's VisionTransformer.
      **options: options of timm's class that replace its defaults.

    Raises:
      ValueError: if timm's class has no such model.
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
    # timm's ConViT expects the width of one head as embed_dim.
    sizes["embed_dim"] //= model.num_heads
    sizes["local_up_to_layer"] = model.local_up_to_layer
    return ConVit(**sizes | options).eval()
