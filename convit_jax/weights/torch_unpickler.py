"""Reading the pickles inside PyTorch's files without running anything that they name.

A pickle can name any function, and an ordinary reader calls it. This reader maps a name to one of
the few functions of this module that describe tensors, and every other name to a class of `Inert`
objects, which ignore what they are given. So the numbers, paths, dates, command lines and objects
that people store beside weights do no harm, whatever they are.
"""

import dataclasses
import io
import math
import pickle
import sys
from typing import IO, Any, ClassVar

import jax.numpy as jnp
import numpy as np

_TYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Functions and classes of the standard library that are called for plain data.
_DATA = (
    "_codecs.encode", "argparse.Namespace", "array.", "builtins.bytearray", "builtins.bytes",
    "builtins.complex", "builtins.dict", "builtins.frozenset", "builtins.getattr", "builtins.list",
    "builtins.object", "builtins.range", "builtins.set", "builtins.slice", "builtins.tuple",
    "builtins.type", "collections.", "copyreg.", "datetime.", "decimal.Decimal", "enum.",
    "fractions.Fraction", "functools.partial", "ipaddress.", "itertools.", "logging.getLogger",
    "operator.", "_operator.", "pathlib.", "random.Random", "re._compile", "time.struct_time",
    "types.SimpleNamespace", "uuid.", "zoneinfo.",
)  # fmt: skip
_KEYS = (str, bytes, int, float, type(None))
_AXES = 64  # the most that an array of numpy may have


@dataclasses.dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors, which are elsewhere in the file.

    Attributes:
      key: name of the storage in the file.
      dtype: type of the numbers; None if numpy has no such type.
      type_name: PyTorch's name of the type.
      size: how many numbers there are.
    """

    key: str
    dtype: np.dtype | None
    type_name: str
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the pickle describes it: a window into a storage, in units of its numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def window(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the tensor, given the numbers of its storage.

        Raises:
          ValueError: if the tensor does not fit into its storage.
        """
        last = self.offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        if math.prod(self.shape) > len(numbers) or (last >= len(numbers) and 0 not in self.shape):
            raise ValueError(
                f"a tensor of shape {self.shape} does not fit into its {len(numbers)} numbers"
            )
        if 0 in self.shape:
            return np.zeros(self.shape, numbers.dtype)
        strides = [stride * numbers.itemsize for stride in self.strides]
        shifted = numbers[self.offset :]
        return np.lib.stride_tricks.as_strided(shifted, self.shape, strides, writeable=False)


class _Called(type):
    """The type of all inert classes. Records the functions of Python that a pickle wants called."""

    full_name: str
    calls: list[str]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = cls.full_name.partition(".")[0]
        if module in sys.stdlib_module_names and not cls.full_name.startswith(_DATA):
            cls.calls.append(cls.full_name)
        return super().__call__()


class Inert(metaclass=_Called):
    """Stands for an object of any class but tensors and plain containers. Ignores its content."""

    full_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def append(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Bounded:
    """A file that reserves no memory for more bytes than it has."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        place = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(place)
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size > 1 << 16 and size > self.end - self.file.tell():
            raise EOFError(f"expected {size} bytes more, got the end of the file")
        return self.file.read(size)


# The unpickler in Python. The one in C reserves memory for as many objects as a file states.
_Base: Any = pickle._Unpickler


class _Unpickler(_Base):
    """Reads a pickle, and changes what could run code or damage the interpreter."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Base.dispatch)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(_Bounded(file), encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self.calls: list[str] = []
        self.inert: dict[str, _Called] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full_name = f"{module}.{name}"
        if full_name in _FUNCTIONS:
            return _FUNCTIONS[full_name]
        if module.startswith("torch") and name.endswith("Storage"):
            return _StorageType(full_name, _TYPES.get(name))
        if full_name not in self.inert:
            attributes = {"full_name": full_name, "calls": self.calls}
            self.inert[full_name] = _Called("Inert", (Inert,), attributes)
        return self.inert[full_name]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension {code}")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class with its source text, before 2020
            return pid[1]
        kind, storage_type, key, _, size, *view = pid
        known = type(key) is str and type(size) is int and size >= 0
        if kind != "storage" or not known or any(v is not None for v in view):
            raise pickle.UnpicklingError("expected a storage")
        storage = Storage(key, storage_type.dtype, storage_type.full_name, size)
        return self.storages.setdefault(storage.key, storage)

    def _build(self) -> None:
        self.stack.pop()  # the state of an object, which nothing here needs

    def _setitems(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):  # other keys than these belong to no weights
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, _KEYS))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._setitems(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._setitems([key, value])

    def _set(self) -> None:
        self.append(self.find_class("builtins", "set")())

    def _bytearray(self) -> None:
        raise pickle.UnpicklingError("a bytearray")  # would be reserved before it is read

    def _frozenset(self) -> None:
        self.pop_mark()
        self._set()

    dispatch |= {
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: lambda self: self._setitems(self.pop_mark()),
        pickle.EMPTY_SET[0]: _set,
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


@dataclasses.dataclass(frozen=True)
class _StorageType:
    full_name: str
    dtype: np.dtype | None


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without its storage")
    numbers = (offset, *shape, *strides)
    if len(shape) > _AXES or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError("a tensor with an offset, a shape or strides that none has")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _tensor_of_type(
    storage: Storage,
    offset: int,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    """Returns a tensor of a type that has no storage of its own, none of which numpy knows."""
    storage = dataclasses.replace(storage, dtype=None, type_name=dtype.full_name)
    return _tensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _with_attributes(function: Any, _: Any, args: Any, *__: Any) -> Any:
    return function(*args) if function in (_tensor, _tensor_of_type) else None


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return {key: value for key, value in items if isinstance(key, _KEYS)}


_FUNCTIONS = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}


@dataclasses.dataclass(frozen=True)
class Unpickled:
    """The content of a pickle.

    Attributes:
      content: dictionaries, lists and plain values with `Tensor` and `Inert` objects among them.
      storages: the storages of its tensors, by key.
      calls: functions of the standard library that the pickle wants called and data do not need.
    """

    content: Any
    storages: dict[str, Storage]
    calls: list[str]


def read(file: IO[bytes]) -> Unpickled:
    """Reads one pickle from a file, up to its end and no further.

    Raises:
      Exception: of any type, if the pickle is damaged.
    """
    unpickler = _Unpickler(file)
    content = unpickler.load()
    return Unpickled(content, unpickler.storages, unpickler.calls)
