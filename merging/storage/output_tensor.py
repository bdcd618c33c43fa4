"""The description of a tensor that is to be written."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from merging.sources.header import DTYPE_BITS

__all__ = ["OutputTensor"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that is to be written: its name, its dtype as safetensors files name it, and its shape."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return DTYPE_BITS[self.dtype_name] // 8

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize
