"""PyTorch's pickle files: state dicts and training checkpoints, read without running their code.

A pickle can name any function, and reading the pickle calls it. Here a pickle may name only the
functions that build tensors, and argparse.Namespace, in which checkpoints of the original code
store their command line.
"""

import argparse
from collections.abc import Mapping
import logging
import os
import pathlib
import pickle
import re
from types import ModuleType
from typing import Any
import zipfile

import numpy as np

log = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pt", ".bin")

# Keys of the weights and of the averaged weights in training checkpoints of the original code and
# of timm.
_WEIGHTS = ("model", "state_dict")
_AVERAGED = ("model_ema", "state_dict_ema")


def read(path: pathlib.Path, *, ema: bool) -> dict[str, Any]:
    """Reads a state dict, or a training checkpoint with one.

    Args:
      path: the file to read.
      ema: whether to take the averaged weights of a checkpoint.

    Returns:
      name -> torch tensor. If the file's format allows it, a tensor is read from disk at first use.

    Raises:
      ValueError: if torch is missing, or the file is not readable, names code to be run, or
        contains no state dict, or no averaged weights with `ema`.
    """
    loaded = _load(path, _import_torch(path))
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(loaded).__name__}")
    averaged = next((loaded[key] for key in _AVERAGED if loaded.get(key) is not None), None)
    if ema and averaged is None:
        raise ValueError(f"{path}: holds no averaged weights (model_ema): read it without ema")
    if averaged is not None and not ema:
        log.info("%s: has averaged weights too; not used, because ema is off", path)
    state_dict = averaged if ema else next((loaded[k] for k in _WEIGHTS if k in loaded), loaded)
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(state_dict).__name__}")
    others = sorted(k for k, v in state_dict.items() if not hasattr(v, "detach"))
    if others or not state_dict:
        raise ValueError(
            f"{path}: expected a state dict, with tensors as its values, got "
            f"{', '.join(map(str, others[:8])) or 'nothing'}"
        )
    return dict(state_dict)


def write(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict with torch.save.

    Raises:
      ValueError: if torch is missing.
    """
    torch = _import_torch(path)
    torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, path)


def _import_torch(path: str | os.PathLike) -> ModuleType:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: needs torch (pip install torch); .safetensors files do without"
        ) from None
    return torch


def _load(path: pathlib.Path, torch: ModuleType) -> Any:
    # PyTorch's format before 2020 is no zip file and cannot be mapped into memory.
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise ValueError(
                f"{path}: refused: reading it would call {named[1]}, and weights need no code. "
                "None of it has been run"
            ) from None
        raise ValueError(f"{path}: not a readable PyTorch file: {_first_line(error)}") from error
    except Exception as error:  # torch raises many types for broken files
        raise ValueError(f"{path}: not a readable PyTorch file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
