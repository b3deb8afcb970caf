"""Independent references for the tests: the paper's equations written out, and timm."""

import numpy as np
import pytest

from benchmarks import peer
from convit_jax import ConViT, create_model, from_torch


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def relative_positions(grid: tuple[int, int], queries: slice = np.s_[:]) -> np.ndarray:
    """Returns r_ij = (dx, dy, dx^2 + dy^2), key minus query, for the given queries: (n, N, 3)."""
    y, x = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    dx, dy = x[None, :] - x[queries, None], y[None, :] - y[queries, None]
    return np.stack([dx, dy, dx**2 + dy**2], axis=-1)


def _float64(params: dict) -> dict:
    return {
        key: _float64(value) if isinstance(value, dict) else np.asarray(value, np.float64)
        for key, value in params.items()
    }


def _split_heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    """(B, N, D) -> (B, H, N, K)."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def _content(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))


def _project(averaged: np.ndarray, params: dict) -> np.ndarray:
    """(B, H, N, K) -> (B, N, D)."""
    batch, _, size, _ = averaged.shape
    joined = averaged.transpose(0, 2, 1, 3).reshape(batch, size, -1)
    return joined @ params["proj"]["kernel"] + params["proj"]["bias"]


def self_attention(params: dict, x: np.ndarray, num_heads: int) -> np.ndarray:
    """Plain attention in float64."""
    params, x = _float64(params), np.asarray(x, np.float64)
    qkv = x @ params["qkv"]["kernel"] + params["qkv"].get("bias", 0)
    q, k, v = (_split_heads(part, num_heads) for part in np.split(qkv, 3, axis=-1))
    return _project(_content(q, k) @ v, params)


def gpsa(
    params: dict,
    x: np.ndarray,
    grid: tuple[int, int],
    num_heads: int,
    kept: np.ndarray | float = 1.0,
) -> dict:
    """Equations 6 and 7 of the paper in float64, every N x N map written out.

    `kept` is the factor by which dropout multiplies the blended map. Returns the maps "content",
    "positional" and "blended", the "gate" and the output "out".
    """
    params, x = _float64(params), np.asarray(x, np.float64)
    qk = x @ params["qk"]["kernel"] + params["qk"].get("bias", 0)
    q, k = (_split_heads(part, num_heads) for part in np.split(qk, 2, axis=-1))
    v = _split_heads(x @ params["v"]["kernel"] + params["v"].get("bias", 0), num_heads)
    content = _content(q, k)
    scores = relative_positions(grid) @ params["pos_proj"]["kernel"] + params["pos_proj"]["bias"]
    positional = softmax(scores.transpose(2, 0, 1))
    gate = 1 / (1 + np.exp(-params["gate"]))
    share = gate[:, None, None]
    blended = (1 - share) * content + share * positional
    out = _project((kept * blended) @ v, params)
    return {
        "content": content,
        "positional": positional,
        "gate": gate,
        "blended": blended,
        "out": out,
    }


def import_timm():
    """Returns (timm, torch); skips the test if they are not installed."""
    try:
        return peer.import_timm()
    except ImportError as error:
        pytest.skip(f"needs timm and torch: {error}")


def timm_like(model):
    """Returns timm's model with the sizes of one of ours, also for rectangles.

    timm computes the relative positions of squares only. For another grid they are set here.
    """
    _, torch = import_timm()
    rows, columns = model.grid
    if rows == columns or not model.local_up_to_layer:
        return peer.like(model)
    square = model.clone(image_size=model.image_shape[0])
    theirs = peer.like(square, img_size=model.image_shape[:2])
    positions = torch.from_numpy(relative_positions(model.grid)).float()[None]
    for block in theirs.blocks[: model.local_up_to_layer]:
        block.attn.rel_indices = positions
    return theirs


def randomise(model, torch, seed: int) -> None:
    """Sets every tensor of a timm model to random values that affect the results.

    The positional weights are drawn so that the softmax is neither flat nor one-hot. With weights
    of N(0, 0.3^2), scores of neighbours differ by some tenths, and of opposite corners by tens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            mean, std = 0.0, 0.2
            if "gating_param" in name:
                std = 1.0
            elif "pos_proj.weight" in name:
                std = 0.3
            elif "norm" in name and name.endswith("weight"):
                mean = 1.0
            elif name.endswith("weight"):
                std = 1.5 / tensor[0].numel() ** 0.5
            tensor.normal_(mean, std, generator=generator)


def timm_images(images: np.ndarray, torch):
    """(B, height, width, channels) numpy -> (B, channels, height, width) torch."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def timm_maps(theirs, images: np.ndarray, torch) -> tuple[list, object]:
    """The attention maps of every layer of timm's model in a forward pass, and its logits.

    The maps keep their gradients, if gradients are computed.
    """
    maps = []

    def keep(module, args, output):
        if output.requires_grad:
            output.retain_grad()
        maps.append(output)

    hooks = []
    for block in theirs.blocks:
        block.attn.fused_attn = False  # of DeiT: writes the map out
        hooks.append(block.attn.attn_drop.register_forward_hook(keep))
    logits = theirs(timm_images(images, torch))
    for hook in hooks:
        hook.remove()
    return maps, logits


def timm_pair(family: str, image_size: tuple[int, int] = (12, 20)) -> tuple:
    """Returns (timm's model, ours, variables of ours): the same random weights, none of them zero.

    The models are small: two GPSA blocks and one plain block, or three plain blocks for "deit";
    patches of 4 pixels, 4 heads, a width of 16, 5 classes. timm's writes its attention maps out.
    """
    _, torch = import_timm()
    sizes = {"patch_size": 4, "depth": 3, "num_classes": 5}
    ours = {"image_size": image_size, "embed_dim": 16, "num_heads": 4, **sizes}
    grid = (image_size[0] // 4, image_size[1] // 4)
    if family == "convit":
        from timm.models.convit import ConVit

        theirs = ConVit(img_size=image_size, embed_dim=4, num_heads=4, local_up_to_layer=2, **sizes)
        model = ConViT(**ours, local_up_to_layer=2)
        for block in theirs.blocks[:2]:  # timm computes the positions of square grids only
            positions = relative_positions(grid).astype(np.float32)
            block.attn.rel_indices = torch.from_numpy(positions)[None]
    else:
        from timm.models.vision_transformer import VisionTransformer

        theirs = VisionTransformer(img_size=image_size, embed_dim=16, num_heads=4, **sizes)
        model = create_model("deit_tiny", **ours)
        for block in theirs.blocks:
            block.attn.fused_attn = False
    randomise(theirs.eval(), torch, seed=0)
    return theirs, model, {"params": from_torch(theirs.state_dict())}
