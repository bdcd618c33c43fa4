"""Tensors in files: known by dtype and shape, read piece by piece into the reader's buffers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from merging import os_calls
from merging.errors import FormatError, InputError
from merging.sources.header import HeaderEntry, read_header
from merging.sources.stamp import Stamp, stamp_of

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "File",
    "FileContents",
    "FileTensor",
    "Holder",
    "MappedTensor",
    "Stored",
    "bytes_of",
    "holders_of",
    "open_safetensors",
]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Torch's dtypes by their names in safetensors files; torch has none for packed types (F4, F6) and bare exponents."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_PIECE = 1 << 22

_NEEDED_FILES, _WANTED_FILES = 8, 64
"""Open files needed besides the inputs (the output, a spool, locks, a database), and the number with some for
libraries."""


class Stored(ABC):
    """A tensor in a file. ``dtype_name`` is its dtype as safetensors files name it ("BF16")."""

    __slots__ = ("dtype_name", "shape")

    def __init__(self, dtype_name: str, shape: tuple[int, ...]) -> None:
        self.dtype_name = dtype_name
        self.shape = shape

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether it holds ordinary floating-point numbers, the only ones that are merged."""
        return self.dtype_name in ("F16", "BF16", "F32", "F64")

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @abstractmethod
    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        """Fill ``buffer`` (one axis, this dtype, on the CPU) with the elements from ``start`` on.

        Raises :class:`~merging.errors.FormatError` when the file has become shorter since it was opened.
        """

    def read(self) -> Tensor:
        """Return the whole tensor, in new memory."""
        buffer = torch.empty(self.numel, dtype=self.dtype)
        self.read_into(buffer)
        return buffer.view(self.shape)

    def finite(self) -> bool:
        """Whether all values are finite; reading stops at the first piece that has another value."""
        for start in range(0, self.numel, _PIECE):
            piece = torch.empty(min(_PIECE, self.numel - start), dtype=self.dtype)
            self.read_into(piece, start)
            if not bool(piece.isfinite().all()):
                return False
        return True

    @abstractmethod
    def advise(self, start: int, count: int) -> None:
        """Announce that these elements are needed soon, so that they can be read ahead."""

    @property
    def at_hand(self) -> bool:
        """Whether its values are on this machine."""
        return True

    def source(self) -> str:
        """Return a text that identifies the content of its file."""
        return self.order()[0]

    @property
    def made_of(self) -> tuple[Stored, ...]:
        """The stored tensors from which it is read: itself, unless it is computed from others."""
        return (self,)

    @property
    def scratch(self) -> int:
        """The bytes of memory that reading any piece takes in addition to the buffer, if they are many."""
        return 0

    @abstractmethod
    def order(self) -> tuple[str, int]:
        """Return the file and the offset of the tensor, so that tensors can be read in the order of their files."""


class Holder(Protocol):
    """A holder of the bytes of tensors: a file on this disk, or one on the Hub that is downloaded when it is read."""

    path: Path

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def at_hand(self) -> bool:
        """Whether it is on this machine."""

    def identity(self) -> str:
        """Return a text that identifies its content."""

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on. Raises :class:`~merging.errors.FormatError`."""

    def advise(self, offset: int, nbytes: int) -> None:
        """Announce that these bytes are needed soon."""


class File:
    """An open file. It stays open as long as one of its tensors lives, and can be read even if it is renamed.

    All its bytes are read in one state: once somebody writes to it, reading raises an error.
    """

    __slots__ = ("fd", "path", "stamp")

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def at_hand(self) -> bool:
        return True

    def identity(self) -> str:
        return str(self.path)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os_calls.open_regular(path)
        # the lowest free number is about the count of open files
        allowed = os_calls.allow_open_files(self.fd + _WANTED_FILES)
        if allowed < self.fd + _NEEDED_FILES:
            raise InputError(
                f"{path}: the system allows this process {allowed} open files, and {self.fd} are open already, with "
                f"{_NEEDED_FILES} more to come: take fewer inputs at once, or raise its limit (ulimit -n)"
            )
        self.stamp = stamp_of(os.fstat(self.fd))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on. Raises :class:`~merging.errors.FormatError`."""
        try:
            os_calls.read_at(self.fd, into, offset)
        except EOFError as error:
            raise FormatError(f"{self.path}: {error}: it was cut while it was read") from None
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.check()

    def check(self) -> None:
        """Raise :class:`~merging.errors.FormatError` if somebody wrote to the file since it was opened."""
        now = stamp_of(os.fstat(self.fd))
        if now == self.stamp:
            return
        if not self.stamp.is_same_state(now) and not self._was_moved(now):
            how = "was cut" if now.size < self.stamp.size else "changed"
            raise FormatError(f"{self.path}: {how} while it was read: try again when it is complete")
        self.stamp = now

    def _was_moved(self, now: Stamp) -> bool:
        """Whether only the name has changed, which also updates the time of the last change of status."""
        try:
            there = stamp_of(self.path.stat())
        except OSError:
            return now[:4] == self.stamp[:4]
        return now[:4] == self.stamp[:4] and there[:2] != now[:2]

    def check_place(self) -> None:
        """Check as :meth:`check` does, and that the path still leads to this file: some readers open it by its path."""
        try:
            there = stamp_of(self.path.stat())
        except OSError:
            there = None
        if there is None or there[:2] != self.stamp[:2]:
            raise FormatError(f"{self.path}: changed while it was read: try again when it is complete")
        self.check()

    def advise(self, offset: int, nbytes: int) -> None:
        """Have the system read these bytes ahead."""
        os_calls.advise(self.fd, offset, nbytes)


class FileTensor(Stored):
    """A tensor of a file, read at its place. Memory is bounded, and a truncated file is an error, not a signal."""

    __slots__ = ("_start", "holder")

    def __init__(self, holder: Holder, entry: HeaderEntry) -> None:
        super().__init__(entry.dtype, entry.shape)
        self.holder = holder
        self._start = entry.start

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        self.holder.read(bytes_of(buffer), self._start + start * buffer.itemsize)

    def advise(self, start: int, count: int) -> None:
        itemsize = self.dtype.itemsize
        self.holder.advise(self._start + start * itemsize, count * itemsize)

    @property
    def at_hand(self) -> bool:
        return self.holder.at_hand

    def source(self) -> str:
        return self.holder.identity()

    def order(self) -> tuple[str, int]:
        return str(self.holder.path), self._start


class MappedTensor(Stored):
    """A tensor in memory, or one that torch has mapped there."""

    __slots__ = ("_order", "tensor")

    def __init__(self, tensor: Tensor, order: tuple[str, int]) -> None:
        super().__init__(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        self.tensor = tensor
        self._order = order

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        flat = self.tensor.reshape(-1)  # a copy only where the tensor is not contiguous
        buffer.copy_(flat[start : start + len(buffer)])

    def advise(self, start: int, count: int) -> None:
        """Do nothing: the system itself reads ahead in a mapped file."""

    def order(self) -> tuple[str, int]:
        return self._order


def holders_of(tensors: Iterable[Stored]) -> list[Holder]:
    """Return the holders of the bytes of tensors, each once, in the order of the tensors."""
    parts = (part for tensor in tensors for part in tensor.made_of)
    return list({id(part.holder): part.holder for part in parts if isinstance(part, FileTensor)}.values())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of one axis, as bytes."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


FileContents = tuple[dict[str, "Stored"], dict[str, str]]
"""The tensors of a file, and its metadata, or for a PyTorch file the names that share memory."""


def open_safetensors(path: Path) -> FileContents:
    """Open a safetensors file: its tensors, and its metadata. Only the header is read.

    Raises :class:`~merging.errors.FormatError` for a file that breaks the format.
    """
    header = read_header(path)
    file = File(path)
    if header.stamp is None or not header.stamp.is_same_state(file.stamp):
        raise FormatError(f"{path}: it changed while it was opened: try again when it is complete")
    return {name: FileTensor(file, entry) for name, entry in header.entries.items()}, header.metadata
