"""PyTorch's files (.bin, .pt, .pth, .ckpt): tensors are read at their places, and no code in the files is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.dtypes import DTYPE_NAMES
from merging.sources.header import HeaderEntry
from merging.sources.open_files import File
from merging.sources.stored import FileContents, FileTensor, Stored
from merging.sources.unpickle import Other, TensorRecord, unpickle

__all__ = ["DAMAGE", "PYTORCH_ENDINGS", "open_pickle", "read_record"]

PYTORCH_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
"""The endings of PyTorch's files."""

DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""Errors that damaged files cause in functions that expect sound ones."""

_LARGEST = 1 << 25
"""The largest size in bytes of a file's list of records, and of its pickle, which describe tensors and hold none."""

_LOCAL = struct.Struct("<4s22xHH")
"""The header of a record: a mark, and the lengths of its name and of further fields."""


_NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys of a model's state dict in the checkpoints of training programs."""


def open_pickle(path: Path) -> FileContents:
    """Open a PyTorch file: its tensors, and for each name that shares another tensor's memory (tied weights) the other.

    Only the descriptions of tensors are read. A .ckpt, as Lightning saves it, may hold objects of any class too: they
    are left out, and no class is imported.

    Raises :class:`~merging.errors.FormatError` for any other file that holds more than tensors, and for compressed
    records. torch never compresses, and a small compressed record can grow without end.
    """
    if not path.is_file():  # reading a device would never end
        raise FormatError(f"{path}: is not a regular file, not a PyTorch file")
    file = File(path)
    try:
        archive = _Archive(file)
        loaded = unpickle(archive.read("data.pkl"), foreign=path.suffix == ".ckpt")
        state = _state_dict(loaded)
        if not _holds_tensors(state):
            raise FormatError(
                f"{path}: is a PyTorch file, but not a state dict (names to tensors): load it, and save its state dict "
                f"as safetensors"
            )
        return _tensors(archive, state)
    except pickle.UnpicklingError as error:
        raise FormatError(f"{path}: holds more than tensors, and nothing in it is run: {error}") from None
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{path}: is a damaged PyTorch file: {reason or type(error).__name__}") from None


def read_record(file: File, start: int, size: int) -> Stored:
    """Return the tensor that torch saved alone in a part of a file. A damaged part raises one of :data:`DAMAGE`."""
    archive = _Archive(file, start, size)
    record = unpickle(archive.read("data.pkl"))
    if not isinstance(record, TensorRecord) or record.dtype not in DTYPE_NAMES:
        raise ValueError(f"it holds {type(record).__name__} in the place of a tensor")
    if prod(record.shape) * record.dtype.itemsize > size:
        raise ValueError(f"a tensor of the shape {record.shape} is larger than its record")
    return archive.tensor(record)


def _state_dict(loaded: Any) -> Any:
    """Return the state dict in a file, perhaps two levels down; if it is ambiguous, the outermost dict."""
    for _ in range(2):
        if not isinstance(loaded, dict) or (loaded and _holds_tensors(loaded)):
            break
        inner = [loaded[name] for name in _NESTS if isinstance(loaded.get(name), dict)]
        loaded = inner[0] if len(inner) == 1 else loaded
    return loaded


def _holds_tensors(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(each, (TensorRecord, Other)) for each in state.values())


def _tensors(archive: _Archive, state: dict[Any, Any]) -> FileContents:
    path = archive.file.path
    tensors: dict[str, Stored] = {}
    shared: dict[str, str] = {}
    seen: dict[str, str] = {}  # by texts: tuples can be made whose hashes are the same
    for name, record in state.items():
        if not isinstance(name, str):
            kind = name.kind if isinstance(name, Other) else repr(name)[:80]
            raise FormatError(f"{path}: is a PyTorch file, but not a state dict: {kind} is not a name")
        if isinstance(record, Other):
            raise FormatError(f"{path}: {name} is not an ordinary tensor, but {record.kind}")
        if record.dtype not in DTYPE_NAMES:
            raise FormatError(f"{path}: {name} has the type {record.dtype}, which cannot be merged")
        if prod(record.shape) * record.dtype.itemsize > archive.size:  # one number, said to be a matrix of gigabytes
            raise FormatError(f"{path}: {name} of the shape {record.shape} is larger than its file")
        first = seen.setdefault(repr(record), name)
        if first != name and prod(record.shape):
            shared[name] = first
        tensors[name] = archive.tensor(record)
    return tensors, shared


class _Archive:
    """The zip file that torch saves: ``NAME/data.pkl``, and for each storage a record ``NAME/data/KEY``.

    It is the whole file, or the part of ``size`` bytes from ``start`` on.
    """

    def __init__(self, file: File, start: int = 0, size: int | None = None) -> None:
        self.file = file
        self.start = start
        self.size = file.size if size is None else size
        if self.start + self.size > file.size:
            raise ValueError(f"it ends after {file.size:,} bytes, and should have {self.start + self.size:,}")
        with _Bounded(file, self.start, self.size) as stream:
            if not zipfile.is_zipfile(stream):
                raise FormatError(
                    f"{file.path}: is not a PyTorch zip file (cut short, or written before 2020), and the old format "
                    f"cannot be read lazily: load and save it as safetensors first"
                )
            with zipfile.ZipFile(stream) as archive:
                self._records = {each.filename: each for each in archive.infolist()}
        self._root = next((name[:-8] for name in self._records if name.endswith("/data.pkl")), "")
        if self._root + "byteorder" in self._records and self.read("byteorder") != b"little":
            raise ValueError("its numbers are stored with their highest byte first")

    def read(self, name: str) -> bytes:
        """Return a whole record."""
        start, length = self._place(name)
        if length > _LARGEST:
            raise ValueError(f"{name} takes {length:,} bytes (limit {_LARGEST:,})")
        content = bytearray(length)
        self.file.read(memoryview(content), start)
        return bytes(content)

    def tensor(self, record: TensorRecord) -> Stored:
        """Return the tensor of a description, at its place in the file."""
        kind, itemsize, count = DTYPE_NAMES[record.dtype], record.dtype.itemsize, prod(record.shape)
        if not count:
            return FileTensor(self.file, HeaderEntry(kind, record.shape, 0, 0))
        place, length = self._place(f"data/{record.storage.key}")
        span = 1 + sum(stride * (side - 1) for side, stride in zip(record.shape, record.strides, strict=True))
        stated = record.storage.count * record.storage.dtype.itemsize
        if (record.offset + span) * itemsize > min(stated, length):
            raise ValueError(f"a tensor of the shape {record.shape} goes beyond its storage")
        start = place + record.offset * itemsize
        if _contiguous(record):
            return FileTensor(self.file, HeaderEntry(kind, record.shape, start, count * itemsize))
        whole = FileTensor(self.file, HeaderEntry(kind, (span,), start, span * itemsize))
        return _StridedTensor(whole, record)

    def _place(self, name: str) -> tuple[int, int]:
        """Return the offset of a record's bytes in the file, and their number."""
        record = self._records[self._root + name]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError(f"its record {name} is compressed, which torch.save never does")
        head = bytearray(_LOCAL.size)
        self.file.read(memoryview(head), self.start + record.header_offset)
        mark, *lengths = _LOCAL.unpack(head)
        start = record.header_offset + len(head) + sum(lengths)
        if mark != b"PK\x03\x04" or record.header_offset < 0 or start + record.file_size > self.size:
            raise ValueError(f"its record {name} is not where its list says")
        return self.start + start, record.file_size


class _Bounded(io.RawIOBase):
    """A part of a file that limits each read: the list of a zip file may claim any size."""

    def __init__(self, file: File, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place of the part."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise OSError("a place before the beginning of the file")
        self._at = place
        return place

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes."""
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > _LARGEST:
            raise ValueError(f"its list of records takes {size:,} bytes (limit {_LARGEST:,})")
        content = bytearray(size)
        self._file.read(memoryview(content), self._start + self._at)
        self._at += size
        return bytes(content)


def _contiguous(record: TensorRecord) -> bool:
    step = 1
    for side, stride in zip(reversed(record.shape), reversed(record.strides), strict=True):
        if side != 1 and stride != step:
            return False
        step *= side
    return True


class _StridedTensor(Stored):
    """A tensor whose elements are not contiguous; it is read as the whole range that contains them."""

    __slots__ = ("_stretch", "_strides")

    def __init__(self, stretch: FileTensor, record: TensorRecord) -> None:
        super().__init__(stretch.dtype_name, record.shape)
        self._stretch = stretch
        self._strides = record.strides

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        stretch = torch.empty(self._stretch.numel, dtype=self.dtype)
        self._stretch.read_into(stretch)
        flat = stretch.as_strided(self.shape, self._strides).reshape(-1)
        buffer.copy_(flat[start : start + len(buffer)])

    def advise(self, start: int, count: int) -> None:
        self._stretch.advise(0, self._stretch.numel)

    @property
    def scratch(self) -> int:
        return self._stretch.nbytes + self.nbytes

    def order(self) -> tuple[str, int]:
        return self._stretch.order()
