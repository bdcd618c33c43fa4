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
from merging.storage.output_tensor import OutputTensor

__all__ = ["GgufWriter"]


class GgufWriter:
    """Writes tensors of known names, types and shapes into one GGUF file.

    The file takes its full size at once, so that a full disk shows before anything is computed. A LoRA is small: it is
    written from the beginning after a run that stopped.

    Args:
        path: The file.
        architecture: llama.cpp's name of the architecture.
        outs: The tensors: F32, F16 or BF16.
        fields: The metadata: texts, booleans, integers that are not negative, floats, and lists of texts.

    Raises:
        OutputError: For errors of the disk.
        InputError: Where the package gguf is not installed.
    """

    resumed = False
    """Whether the values of a former run are there."""

    def __init__(self, path: Path, architecture: str, outs: Sequence[OutputTensor], fields: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        self._left = {out.name: out.nbytes for out in outs}
        self._lock = threading.Lock()
        self._fd = -1
        try:
            alignment = _write_header(path, architecture, outs, fields)
            self._fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            position = _align(os.fstat(self._fd).st_size, alignment)
            for out in outs:
                self._places[out.name] = position
                position = _align(position + out.nbytes, alignment)
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
        """Accept no bytes: nothing was written before."""
        assert not written

    def sync(self) -> None:
        """Make everything that was written durable."""
        os_calls.sync(self._fd)

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
