"""The content of PyTorch's pickles, read without torch: no code is run, and memory and time are bounded.

Of tensors only the places are read. Everything else becomes an object without content. A pickle could ask for gigabytes
in a few bytes where a list is copied, a text encoded repeatedly, or a tensor made by its size. It could also ask for
years, where a tuple of tuples that each hold the previous tuple three times is hashed or compared."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from merging.maths.lazy_torch import torch

__all__ = ["Foreign", "Other", "Storage", "TensorRecord", "unpickle"]

_MAX_STEPS = 1 << 22
"""The largest number of instructions in one pickle: enough for some hundred thousand tensors, which take seconds."""

_MAX_BITS = 64
"""The largest integer, in bits."""

_LONGEST_KEY = 4096
"""The longest text that is used as a key; longer texts could be compared again and again."""

_MOST_ARGUMENTS = 64
"""The largest number of a function's arguments, and of a tensor's axes; more could be copied again and again."""

_REFUSED = frozenset({"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"})
"""Instructions that PyTorch's files never need; the first reserves as much memory as it states."""

_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
"""The types of the storages that files name by a class."""

_HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "builtins": "bytearray complex set",
        "__builtin__": "bytearray complex set",
        "collections": "Counter",
        "torch": "device per_tensor_affine per_channel_affine per_tensor_symmetric per_channel_symmetric "
        "per_channel_affine_float_qparams QInt8Storage QUInt8Storage QInt32Storage Tensor",
        "torch.nn.parameter": "Parameter Buffer",
        "torch.serialization": "_get_layout",
        "torch._utils": "_rebuild_sparse_tensor _rebuild_meta_tensor_no_storage _rebuild_qtensor "
        "_rebuild_nested_tensor _rebuild_wrapper_subclass _rebuild_device_tensor_from_numpy "
        "_rebuild_device_tensor_from_cpu_tensor",
    }.items()
    for name in names.split()
)
"""Names that torch also accepts in a file whose code it does not run."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of tensors: the name of its record, its type, and its number of elements."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor by its place: storage, dtype, first element, shape, and the steps along its axes."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Other:
    """A placeholder for an object that is not an ordinary tensor or plain key; only the name of its type is kept."""

    def __init__(self, kind: str, *_: object) -> None:
        self.kind = kind

    def __setitem__(self, *_: object) -> None:
        """Do nothing."""


class Foreign(Other):
    """An object of a class that is never imported: the class's name, and the state that the pickle gives the object."""

    def __init__(self, kind: str, *_: object) -> None:
        super().__init__(kind)
        self.state: Any = None

    def append(self, value: object) -> None:
        """Do nothing."""

    def extend(self, values: object) -> None:
        """Do nothing."""


def unpickle(data: bytes, foreign: bool = False) -> Any:
    """Return the content of a pickle: plain values, with :class:`TensorRecord` and :class:`Other` in them.

    ``foreign`` lets in objects of any class as :class:`Foreign`: programs keep their settings next to the tensors.
    Raises pickle.UnpicklingError for a pickle that needs anything else, and ValueError or a related error for a damaged
    one.
    """
    for step, (code, argument, _) in enumerate(pickletools.genops(data)):
        if step > _MAX_STEPS:
            raise ValueError(f"it has more than {_MAX_STEPS:,} instructions")
        if code.name in _REFUSED:
            raise pickle.UnpicklingError(f"it uses {code.name}")
        # The memory for a memo is taken up to its largest number.
        if isinstance(argument, int) and code.name in ("PUT", "LONG_BINPUT") and argument > len(data):
            raise ValueError("it numbers more values than it holds")
        if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
            raise ValueError("it holds a number that is too large")
    return _Reader(io.BytesIO(data), foreign).load()


class _Reader(pickle._Unpickler):
    """An unpickler that understands descriptions of tensors, and builds nothing else.

    It extends Python's own implementation, since the implementation in C hides keys until they are hashed.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, foreign: bool) -> None:
        super().__init__(stream)
        self.foreign = foreign

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a global name of a pickle."""
        full = f"{module}.{name}"
        if full in _MAKERS:
            return _MAKERS[full]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return getattr(torch, _DTYPES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full in _HARMLESS:
            return partial(Other, name.removeprefix("_rebuild_"))
        if self.foreign:
            return partial(Foreign, full)
        raise pickle.UnpicklingError(f"it names {full[:200]}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a pickle refers to."""
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count) if count >= 0:
                if len(key) <= _LONGEST_KEY:
                    return Storage(key, dtype, count)
        raise ValueError("it refers to something that is not a storage")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _make_set(self) -> None:
        self.stack.append(Other("set"))

    def _make_full_set(self) -> None:
        self.pop_mark()
        self.stack.append(Other("set"))

    def _fill_set(self) -> None:
        self.pop_mark()

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise ValueError("it calls a function in no known way")
        self.stack.append(function(*arguments))

    def _make_object(self) -> None:
        _, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, partial):
            raise ValueError("it makes an object in no known way")
        self.stack.append(kind())

    def _make_object_by_name(self) -> None:
        self.stack.pop()
        self._make_object()

    def _set_state(self) -> None:
        state = self.stack.pop()  # a state dict's attributes are not needed, and other objects' could do harm
        if isinstance(self.stack[-1], Foreign):
            self.stack[-1].state = state

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _make_dict,
        pickle.EMPTY_SET[0]: _make_set,
        pickle.FROZENSET[0]: _make_full_set,
        pickle.ADDITEMS[0]: _fill_set,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _make_object,
        pickle.NEWOBJ_EX[0]: _make_object_by_name,
        pickle.BUILD[0]: _set_state,
    }


def _key(value: Any) -> Any:
    """Return a key that is safe to hash and compare: a plain value, or a placeholder for any other."""
    if value is None or isinstance(value, (bool, int, float, Foreign)):  # a foreign object equals only itself
        return value
    if isinstance(value, (str, bytes)) and len(value) <= _LONGEST_KEY:
        return value
    return Other(type(value).__name__)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRecord:
    return _record(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    return _record(storage, offset, shape, strides, dtype)


def _record(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> TensorRecord:
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise ValueError("it describes a tensor without a place")
    if len(shape) > _MOST_ARGUMENTS:
        raise ValueError(f"it describes a tensor of {len(shape):,} axes")
    if not all(type(each) is int and 0 <= each < 1 << 62 for each in (offset, *shape, *strides)):
        raise ValueError("it describes a tensor without a place")
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("it describes a tensor without a storage")
    return TensorRecord(storage, dtype, offset, shape, strides)


def _empty_dict(*content: Any) -> OrderedDict[Any, Any]:
    if content:  # filled later, by instructions of its own; copies could be without end
        raise ValueError("it copies a dict")
    return OrderedDict()


def _first(value: Any, *_: Any) -> Any:
    return value


def _subclass(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    known = isinstance(arguments, tuple) and len(arguments) <= _MOST_ARGUMENTS
    if not known or function not in (_tensor, _tensor_of_type, _first):
        raise ValueError("it describes a tensor in no known way")
    return function(*arguments)


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _first,
}
