"""Independent references for the tests: the paper's equations written out, and timm."""

import numpy as np
import pytest

from benchmarks import peer


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def relative_positions(grid: tuple[int, int], queries: slice = np.s_[:]) -> np.ndarray:
    """r_ij = (dx, dy, dx^2 + dy^2), key minus query, for the queries named: (n, N, 3)."""
    y, x = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    dx, dy = x[None, :] - x[queries, None], y[None, :] - y[queries, None]
    return np.stack([dx, dy, dx**2 + dy**2], axis=-1)


def gpsa(params: dict, x: np.ndarray, grid: tuple[int, int], num_heads: int) -> dict:
    """Equations 6 and 7 of the paper in float64, every N x N map written out.

    Returns the maps "content", "positional", "blended", the "gate" and the output "out".
    """
    params = {
        key: {k: np.asarray(v, np.float64) for k, v in value.items()}
        if isinstance(value, dict)
        else np.asarray(value, np.float64)
        for key, value in params.items()
    }
    x = np.asarray(x, np.float64)
    batch, size, width = x.shape
    head = width // num_heads

    def heads(y: np.ndarray) -> np.ndarray:
        return y.reshape(batch, size, num_heads, head).transpose(0, 2, 1, 3)

    qk = x @ params["qk"]["kernel"] + params["qk"].get("bias", 0)
    q, k = heads(qk[..., :width]), heads(qk[..., width:])
    v = heads(x @ params["v"]["kernel"] + params["v"].get("bias", 0))
    content = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(head))
    scores = relative_positions(grid) @ params["pos_proj"]["kernel"] + params["pos_proj"]["bias"]
    positional = softmax(scores.transpose(2, 0, 1))
    gate = 1 / (1 + np.exp(-params["gate"]))
    share = gate[:, None, None]
    blended = (1 - share) * content + share * positional
    out = (blended @ v).transpose(0, 2, 1, 3).reshape(batch, size, width)
    out = out @ params["proj"]["kernel"] + params["proj"]["bias"]
    return {
        "content": content,
        "positional": positional,
        "gate": gate,
        "blended": blended,
        "out": out,
    }


def import_timm():
    """(timm, torch); skips the test where they are not installed."""
    try:
        return peer.import_timm()
    except ImportError as error:
        pytest.skip(f"needs timm and torch: {error}")


def randomise(model, torch, seed: int) -> None:
    """Random values for every tensor of a timm model, of sizes at which each one matters.

    The positional weights make a softmax that is neither flat nor one-hot: with weights of
    N(0, 0.3^2), scores of neighbours differ by some tenths, of opposite corners by tens.
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
