"""PyTorch's files: state dicts and training checkpoints, read without torch.

There are two formats. Since 2020 torch.save writes a zip archive, with a pickle and a member for
each storage. Before, it wrote five pickles one after the other, and then the storages.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import io
import logging
import os
import pathlib
import struct
from typing import IO, Any
import zipfile

import numpy as np

from convit_jax import storage
from convit_jax.weights import torch_unpickler
from convit_jax.weights.names import seems_to_be
from convit_jax.weights.torch_unpickler import Inert, Storage, Tensor, Unpickled

log = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".th")
# The first bytes of both formats.
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# Keys of the weights in training checkpoints of the original code, timm, PyTorch's tutorials and
# others. The first that has weights is taken. The keys of the averaged weights are below.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict")


def read(path: pathlib.Path, *, ema: bool) -> dict[str, np.ndarray]:
    """Reads a state dict, or a training checkpoint with one.

    Args:
      path: the file to read; from a bucket it is copied to a temporary file first.
      ema: whether to take the averaged weights of a checkpoint.

    Returns:
      name -> array, of the type that the file has.

    Raises:
      ValueError: if the file is not readable, wants code to be run, or contains no state dict, or
        no averaged weights with `ema`.
    """
    with storage.local_file(path) as local:
        return _read(local, path, ema)


def _read(local: pathlib.Path, path: pathlib.Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads a local file whose name in messages is `path`."""
    try:
        with local.open("rb") as file:
            opened = _open_zip if file.read(4) == ZIP else _open_legacy
            file.seek(0)
            with opened(file) as (unpickled, numbers):
                state_dict = _choose(path, unpickled, ema)
                numbers = functools.cache(numbers)  # several tensors may be views of one storage
                return {name: _array(name, state_dict[name], numbers) for name in state_dict}
    except _UnusableError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # damaged files raise errors of many types
        message = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path}: not a readable PyTorch file: {message}") from error


def write(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict with torch.save.

    Raises:
      ValueError: if torch is missing.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: needs torch (pip install torch); .safetensors files do without"
        ) from None
    torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, path)


class _UnusableError(ValueError):
    """A file that is whole, but has no weights that can be used."""


_Numbers = Callable[[Storage], np.ndarray]


@contextlib.contextmanager
def _open_zip(file: IO[bytes]) -> Iterator[tuple[Unpickled, _Numbers]]:
    """Yields the content of a zip archive, and a function that reads the numbers of a storage."""
    size_of_file = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if all(info.CRC == 0 for info in members.values()):
            for info in members.values():  # torch.serialization.set_crc32_options(False)
                del info.CRC
        if any(name.endswith(".npy") for name in members):
            raise _UnusableError("expected a PyTorch file, got arrays of numpy.savez")
        pickled = next((name for name in members if name.endswith("data.pkl")), None)
        if pickled is None:
            raise ValueError("a zip archive without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in members:
            raise _UnusableError(
                "expected a state dict, got a TorchScript archive, which is code. Where it was "
                "made: torch.save(torch.jit.load(FILE).state_dict(), ...)"
            )

        def content(name: str, size: int | None = None) -> bytes:
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size_of_file:
                raise ValueError(f"{name}: is not in the archive as torch.save stores it")
            if size is not None and info.file_size != size:
                raise ValueError(f"{name}: expected {size} bytes, got {info.file_size}")
            return archive.read(info)  # fails if the checksum does

        order = f"{folder}byteorder"
        big = order in members and content(order) == b"big"

        def numbers(storage: Storage) -> np.ndarray:
            assert storage.dtype is not None
            dtype = storage.dtype.newbyteorder(">" if big else "<")
            data = content(f"{folder}data/{storage.key}", storage.size * dtype.itemsize)
            return np.frombuffer(data, dtype)

        yield torch_unpickler.read(io.BytesIO(content(pickled))), numbers


@contextlib.contextmanager
def _open_legacy(file: IO[bytes]) -> Iterator[tuple[Unpickled, _Numbers]]:
    """Yields the content of a file of before 2020 and a function that reads a storage.

    All numbers in such a file are little-endian.
    """
    if file.read(len(LEGACY)) != LEGACY:
        raise ValueError("neither a zip archive nor the format of before 2020")
    for _ in ("version", "system"):
        torch_unpickler.read(file)
    unpickled = torch_unpickler.read(file)
    offsets = {}
    size_of_file = os.fstat(file.fileno()).st_size
    for key in torch_unpickler.read(file).content:
        if type(key) is not str:
            raise ValueError("a storage without a name")
        storage = unpickled.storages[key]
        (size,) = struct.unpack("<q", file.read(8))
        offsets[key] = file.tell()
        end = offsets[key] + storage.size * _width(storage)
        if size != storage.size or end > size_of_file:
            raise ValueError(f"storage {key}: expected {storage.size} numbers, got {size}")
        file.seek(end)

    def numbers(storage: Storage) -> np.ndarray:
        assert storage.dtype is not None
        file.seek(offsets[storage.key])
        data = file.read(storage.size * storage.dtype.itemsize)
        return np.frombuffer(data, storage.dtype.newbyteorder("<"))

    yield unpickled, numbers


def _width(storage: Storage) -> int:
    """Returns the bytes of a number; those of complex numbers are not read, but skipped."""
    widths = {"torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16}
    return storage.dtype.itemsize if storage.dtype else widths.get(storage.type_name, 1)


def _array(name: str, tensor: Tensor, numbers: _Numbers) -> np.ndarray:
    if tensor.storage.dtype is None:
        raise _UnusableError(
            f"{name}: expected floating-point numbers of 16, 32 or 64 bits, got "
            f"{tensor.storage.type_name}. Where it was made: torch.save({{k: v.float() for k, v in "
            "model.state_dict().items()}, ...)"
        )
    try:
        return tensor.window(numbers(tensor.storage))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _choose(path: pathlib.Path, unpickled: Unpickled, ema: bool) -> dict[str, Tensor]:
    """Returns the weights, or the averaged weights, in the content of a file."""
    content = unpickled.content
    if unpickled.calls:
        raise _UnusableError(
            f"refused: reading it would call {unpickled.calls[0]}, and weights need no code. None "
            "of it has been run"
        )
    if not isinstance(content, dict):
        raise _UnusableError(f"expected a state dict, got {_kind(content)}")
    averaged = _find(content, _AVERAGED)
    if ema and averaged is None:
        raise _UnusableError("holds no averaged weights (model_ema): read it without ema")
    if ema and averaged is not None:
        return averaged
    if averaged is not None:
        log.info("%s: has averaged weights too; not used, because ema is off", path)
    found = {key: state_dict for key in _WEIGHTS if (state_dict := _find(content, (key,)))}
    if found:
        first, *rest = found
        if rest:
            log.info("%s: reads the weights at %s, not those at %s", path, first, ", ".join(rest))
        return found[first]
    others = [f"{key} ({_kind(v)})" for key, v in content.items() if not _is_weight(key, v)]
    if others or not content:
        seems = seems_to_be([str(key) for key in content])
        raise _UnusableError(
            f"no state dict; {f'it seems to be {seems}; ' if seems else ''}expected tensors, or a "
            f"dictionary of tensors as {', '.join(_WEIGHTS)}; got "
            f"{', '.join(others[:10]) or 'nothing'}"
        )
    return content


def _find(
    content: dict[str, Any], keys: tuple[str, ...], levels: int = 2
) -> dict[str, Tensor] | None:
    """Returns the state dict at the first of the keys that has one, at most two levels deep."""
    for key in keys:
        inner = content.get(key)
        if isinstance(inner, dict) and inner:
            if all(_is_weight(*item) for item in inner.items()):
                return inner
            if levels > 1 and (deeper := _find(inner, _WEIGHTS, levels - 1)) is not None:
                return deeper
    return None


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _kind(value: Any) -> str:
    """Returns what a value is, for messages. Of an object, also how to save its weights."""
    if isinstance(value, Inert):
        return (
            f"an object of {type(value).full_name}, whose code is not here. Where it was made: "
            "torch.save(model.state_dict(), ...)"
        )
    if isinstance(value, dict):
        other = [key for key, inner in value.items() if not _is_weight(key, inner)]
        return f"dict, whose {other[0]!r} is no named tensor" if other else "empty dict"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__
