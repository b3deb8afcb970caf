"""Writes the golden arrays: small models of timm, their inputs, outputs and gradients.

    python tests/golden/make.py

Needs torch and timm (the stored files are by torch 2.13.0 and timm 1.0.31). A file has the arrays
"images" (B, height, width, 3) and "logits", and for each tensor of the state dict "state/NAME" and
"grad/NAME", the gradient of sum(logits * cos(0, 1, 2, ...)).
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from reference import import_timm, randomise, timm_images  # noqa: E402


def make(name: str, model, torch, seed: int) -> None:
    randomise(model, torch, seed)
    images = np.random.default_rng(seed).standard_normal((2, 16, 16, 3), np.float32)
    logits = model.eval()(timm_images(images, torch))
    weights = torch.cos(torch.arange(logits.numel(), dtype=torch.float32)).reshape(logits.shape)
    (logits * weights).sum().backward()
    arrays = {"images": images, "logits": logits.detach().numpy()}
    for key, tensor in model.named_parameters():
        arrays[f"state/{key}"] = tensor.detach().numpy()
        arrays[f"grad/{key}"] = tensor.grad.numpy()
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def main() -> None:
    _, torch = import_timm()
    from timm.models.convit import ConVit
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 16, "patch_size": 4, "num_classes": 5, "num_heads": 4, "mlp_ratio": 2.0}
    convit = ConVit(embed_dim=4, depth=3, local_up_to_layer=2, **size)  # width 4 * 4 heads
    make("convit", convit, torch, seed=1)
    make("deit", VisionTransformer(embed_dim=16, depth=2, **size), torch, seed=2)


if __name__ == "__main__":
    main()
