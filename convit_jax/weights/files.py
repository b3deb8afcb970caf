"""Reads files of weights. The first bytes of a file tell its format."""

import json
import logging
import pathlib
from typing import Any

import numpy as np

from convit_jax.weights import torch_pickle
from convit_jax.weights.safetensors import read_safetensors

log = logging.getLogger(__name__)

INDEX = ".index.json"  # how the name of a list of shards ends
SUFFIXES = (".safetensors", *torch_pickle.SUFFIXES, INDEX)

# First bytes of what people take for weights, and what to do about it.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, without the file: run git lfs pull",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "an array of numpy.save",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"<": "a web page: download it again",
}


def read_state_dict(
    path: pathlib.Path, *, ema: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a state dict from a file of any format, whatever its suffix.

    Args:
      path: a safetensors file, a PyTorch file, or the list of a file's shards
        ("model.safetensors.index.json"), on a disk or in a bucket.
      ema: whether to take the averaged weights of a checkpoint.

    Returns:
      (name -> array, this project's metadata), the metadata {} if the file has none.

    Raises:
      ValueError: if the file cannot be read or has no state dict.
      OSError: if a file or a shard does not exist.
    """
    with path.open("rb") as file:
        start = file.read(32)
    one = "has one set of weights: leave out ema"
    if start[4:9] == b"\0\0\0\0{" or (path.suffix == ".safetensors" and len(start) < 9):
        if ema:
            raise ValueError(f"{path}: a .safetensors file {one}")
        return read_safetensors(path)
    if start.lstrip()[:1] == b"{":
        if ema:
            raise ValueError(f"{path}: a list of shards {one}")
        return _read_shards(path), {}
    if start.startswith((torch_pickle.ZIP, torch_pickle.LEGACY[:1])):
        return torch_pickle.read(path, ema=ema), {}
    what = next((what for first, what in _OTHERS.items() if start.startswith(first)), None)
    got = what or (f"one that begins with {start[:8]!r}" if start else "an empty file")
    raise ValueError(f"{path}: expected a safetensors or PyTorch file, got {got}")


def shards(path: pathlib.Path) -> dict[str, str]:
    """Reads a list of shards: name of a tensor -> name of its file, which is in the same folder.

    Raises:
      ValueError: if the file is not a list of shards.
    """
    try:
        listed = json.loads(path.read_text())["weight_map"]
        if any(pathlib.PurePath(file).name != file for file in listed.values()):
            raise ValueError("expected names of files in its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a list of shards (weight_map): {error!r}") from error
    return listed


def _read_shards(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors that a list of shards names, each from its file."""
    listed = shards(path)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(listed.values())):
        shard = path.parent / file
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such file, but {path.name} names it")
        with shard.open("rb") as opened:
            if opened.read(32).lstrip()[:1] == b"{":
                raise ValueError(f"{path}: names another list: {file}")
        read, _ = read_state_dict(shard)
        wanted = [name for name in listed if listed[name] == file]
        if missing := [name for name in wanted if name not in read]:
            raise ValueError(
                f"{shard}: lacks {', '.join(missing[:10])}, which {path.name} says it has"
            )
        if extra := sorted(read.keys() - set(wanted)):
            raise ValueError(f"{shard}: has {', '.join(extra[:10])}, which {path.name} lacks")
        tensors |= read
    log.info("%s: read %d shards", path, len(set(listed.values())))
    return tensors
