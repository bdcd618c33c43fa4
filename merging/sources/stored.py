"""Tensors in files: known by dtype and shape, read piece by piece into the reader's buffers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from math import prod
from pathlib import Path

from merging.display.tables import Displayed
from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.dtypes import DTYPE_NAMES, DTYPES
from merging.sources.header import DTYPE_BITS, HeaderEntry
from merging.sources.known_headers import read_known_header
from merging.sources.open_files import File, Holder

__all__ = [
    "FileContents",
    "FileTensor",
    "MappedTensor",
    "Stored",
    "bytes_of",
    "holders_of",
    "open_safetensors",
]

_PIECE = 1 << 22


class Stored(Displayed):  # no ABC: whether a value is a Stored is asked many times for each tensor
    """A tensor in a file. ``dtype_name`` is its dtype as safetensors files name it ("BF16")."""

    __slots__ = ("dtype_name", "shape")

    def __init__(self, dtype_name: str, shape: tuple[int, ...]) -> None:
        self.dtype_name = dtype_name
        self.shape = shape

    def _display_fields(self) -> dict[str, object]:
        return {"shape": self.shape, "dtype": self.dtype_name}

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
        return self.numel * DTYPE_BITS[self.dtype_name] // 8

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

    def read_bytes(self, start: int, count: int) -> bytes:
        """Return the bytes of ``count`` elements from ``start`` on."""
        buffer = torch.empty(count, dtype=self.dtype)
        self.read_into(buffer, start)
        return bytes(bytes_of(buffer))

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

    @property
    def readable(self) -> bool:
        """Whether its values can be read now; a merge's own output can be read by another merge while both run."""
        return True

    def source(self) -> str:
        """Return a text that identifies the content of its file."""
        return self.order()[0]

    @property
    def quantized(self) -> str | None:
        """The type of the codes that it is computed from, None for ordinary numbers."""
        return None

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


class FileTensor(Stored):
    """A tensor of a file, read at its place. Memory is bounded, and a truncated file is an error, not a signal."""

    __slots__ = ("_start", "holder")

    def __init__(self, holder: Holder, entry: HeaderEntry) -> None:
        self.dtype_name, self.shape = entry.dtype, entry.shape  # faster than super().__init__()
        self.holder = holder
        self._start = entry.start

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        self.holder.read(bytes_of(buffer), self._start + start * buffer.itemsize)

    def read_bytes(self, start: int, count: int) -> bytes:
        itemsize = DTYPE_BITS[self.dtype_name] // 8
        buffer = bytearray(count * itemsize)  # without torch, so that plans are made without it
        if buffer:
            self.holder.read(memoryview(buffer), self._start + start * itemsize)
        return bytes(buffer)

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
    header = read_known_header(path)
    file = File(path)
    if header.stamp is None or not header.stamp.is_same_state(file.stamp):
        raise FormatError(f"{path}: it changed while it was opened: try again when it is complete")
    return {name: FileTensor(file, entry) for name, entry in header.entries.items()}, dict(header.metadata)
