"""safetensors files: ours, with the model in their metadata, and those of timm."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from convit_jax.model import variants
from convit_jax.storage import whole_file
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.state_dict import to_torch

_METADATA = "convit_jax"  # the key of ours
_EXTRAS = ("class_names", "mean", "std", "crop_pct")  # of Loaded


def save_weights(path: str | os.PathLike, loaded: Loaded) -> None:
    """Writes our export; whole, or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    extras = {key: getattr(loaded, key) for key in _EXTRAS}
    ours = {"options": variants.to_json(loaded.model), **extras}
    # One key: safetensors writes several in an order of chance, and equal weights are to be equal
    # files.
    metadata = {_METADATA: json.dumps(ours)}
    state_dict = to_torch(loaded.params)
    with whole_file(path, SafetensorError) as unfinished:
        save_file(state_dict, unfinished, metadata=metadata)


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict, and our metadata: {} if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    if _METADATA not in metadata:
        return state_dict, {}
    try:
        written = json.loads(metadata[_METADATA])
        ours = {key: written[key] for key in _EXTRAS}
        for key in ("class_names", "mean", "std"):
            ours[key] = None if ours[key] is None else tuple(ours[key])
        return state_dict, {"options": dict(written["options"]), **ours}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the metadata {_METADATA!r} are not ours: {error!r}") from error
