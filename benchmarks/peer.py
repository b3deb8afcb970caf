"""timm and PyTorch, the peers that tests and benchmarks compare with."""

from types import ModuleType

from convit_jax import VARIANTS, create_model

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
    from timm.models.convit import ConVit

    if name.startswith("deit"):
        return timm.create_model(f"{name}_patch16_224").eval()
    # timm registers three of the six, and takes the width of a head for embed_dim.
    model = create_model(name)
    head = model.embed_dim // model.num_heads
    return ConVit(embed_dim=head, num_heads=model.num_heads, local_up_to_layer=10).eval()
