"""A writer of GGUF files with bounded memory: the header by the package gguf, then any piece at its position."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import OutputError
from merging.maths.lazy_torch import Tensor
from merging.sources.gguf.tensor_types import gguf_package
from merging.sources.stored import bytes_of
from merging.storage.output_file import starts_with
from merging.storage.output_tensor import OutputTensor
from merging.storage.placed_files import PlacedFiles, TensorPlace

__all__ = ["GgufWriter"]


class GgufWriter:
    """Writes tensors of known names, types and shapes into one GGUF file.

    The file takes its full size at once, so that a full disk shows before anything is computed.

    Args:
        path: The file.
        architecture: llama.cpp's name of the architecture.
        outs: The tensors: F32, F16 or BF16.
        fields: The metadata: texts, booleans, integers that are not negative, floats, and lists of texts.
        resume: Whether a file of the same header and size is written on; ``resumed`` says whether there was one.

    Raises:
        OutputError: For errors of the disk.
        InputError: Where the package gguf is not installed.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        outs: Sequence[OutputTensor],
        fields: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.path = path
        self.resumed = False
        self._places: dict[str, int] = {}
        self._left = {out.name: out.nbytes for out in outs}
        self._lock = threading.Lock()
        self._fd = -1
        new = path.with_suffix(".header")
        try:
            alignment = _write_header(new, architecture, outs, fields)
            header = new.read_bytes()
            position = _align(len(header), alignment)
            for out in outs:
                self._places[out.name] = position
                position = _align(position + out.nbytes, alignment)
            if resume and path.exists():
                self._fd = _open(path)
                self.resumed = starts_with(self._fd, header, position)
            if self.resumed:
                new.unlink()
                return
            self.close()
            new.replace(path)
            self._fd = _open(path)
            os_calls.reserve(self._fd, position)
        except OSError as error:
            self.close()
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write the elements ``values`` (one axis, contiguous, on the CPU) at position ``start`` of a tensor."""
        data = bytes_of(values)
        try:
            os_calls.write_at(self._fd, data, self._places[name] + start * values.itemsize)
        except OSError as error:
            raise OutputError(f"{self.path}: {name} cannot be written: {error.strerror}") from None
        with self._lock:
            self._left[name] -= len(data)

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written, since another process wrote them, or a run that stopped."""
        for name, count in written.items():
            self._left[name] -= count

    def __reduce__(self) -> tuple[Any, ...]:
        path = self.path.absolute()
        return PlacedFiles, ({name: TensorPlace(path, start) for name, start in self._places.items()},)

    def sync(self) -> None:
        """Make everything that was written durable."""
        os_calls.sync(self._fd)
        os_calls.sync_folder(self.path.parent)

    def finish(self) -> None:
        """Check that every byte was written, and make the file durable."""
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise AssertionError(f"{unwritten[0]} and {len(unwritten) - 1} more were not written completely")
        try:
            os_calls.sync(self._fd)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.close()

    def close(self) -> None:
        """Close the file; the writer cannot be used afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _write_header(path: Path, architecture: str, outs: Sequence[OutputTensor], fields: Mapping[str, Any]) -> int:
    """Write everything before the tensors' bytes, and return their alignment."""
    package = gguf_package()
    import numpy

    writer = package.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for out in outs:
        kind = package.GGMLQuantizationType[out.dtype_name]
        writer.add_tensor_info(out.name, out.shape, numpy.dtype("float32"), out.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return int(writer.data_alignment)
