"""safetensors files: those of this project, and those of timm.

Files written here use PyTorch's names (see `convit_jax.weights.state_dict`). timm reads them like
any other: `model.load_state_dict(safetensors.torch.load_file(path))`. Their metadata contains the
options of the model and what predictions need: class names, normalisation and crop.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from convit_jax import storage
from convit_jax.model import variants
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.state_dict import to_torch

_METADATA = "convit_jax"  # key of our metadata in the file
_EXTRAS = ("class_names", "mean", "std", "crop_pct")  # fields of Loaded in the metadata


def save_weights(path: str | os.PathLike, loaded: Loaded) -> None:
    """Writes weights and their metadata to a file, whole or not at all.

    Raises:
      OSError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    extras = {key: getattr(loaded, key) for key in _EXTRAS}
    ours = {"options": variants.to_json(loaded.model), **extras}
    # safetensors writes several keys in random order. With one key, equal weights give equal files.
    metadata = {_METADATA: json.dumps(ours)}
    state_dict = to_torch(loaded.params)
    with storage.whole_file(path, SafetensorError) as unfinished:
        save_file(state_dict, unfinished, metadata=metadata)


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a state dict and this project's metadata, {} if the file has none.

    Raises:
      ValueError: if the file or the metadata cannot be read.
    """
    with storage.local_file(path) as local:
        state_dict, metadata = _read(local, path)
    if _METADATA not in metadata:
        return state_dict, {}
    try:
        written = json.loads(metadata[_METADATA])
        ours = {key: written[key] for key in _EXTRAS}
        for key in ("class_names", "mean", "std"):
            ours[key] = None if ours[key] is None else tuple(ours[key])
        return state_dict, {"options": dict(written["options"]), **ours}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the metadata {_METADATA!r} cannot be read: {error!r}") from error


def _read(local: pathlib.Path, path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and the metadata of a local file whose name in messages is `path`."""
    from safetensors import safe_open

    try:
        with safe_open(local, framework="np") as file:
            metadata = file.metadata() or {}
            state_dict = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
        return state_dict, metadata
    except _UnknownTypeError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # damaged files raise errors of several types
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


class _UnknownTypeError(ValueError):
    """A tensor of a type that numpy lacks."""


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError:  # numpy has no such type
        found = file.get_slice(name).get_dtype()
        raise _UnknownTypeError(
            f"{name}: expected floating-point numbers of 16, 32 or 64 bits, got {found}"
        ) from None
