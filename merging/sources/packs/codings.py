"""Codings of tensors in packs, and the tensors that decode them when they are read."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Annotated, Literal
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field

from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.packs.frames import Frames, index_bytes
from merging.sources.packs.golomb import Bits
from merging.sources.packs.grouped import group_bytes, unpack_groups
from merging.sources.stored import Stored

__all__ = ["Bands", "Coding", "DtypeName", "Packed", "Raw", "Sparse", "Ternary"]

DtypeName = Literal["F16", "BF16", "F32", "F64"]

Fill = Callable[[Tensor, int], None]
"""A function that fills a buffer with the elements from an offset on; it raises ValueError for a damaged payload."""

_MOST = 1 << 12
"""The most entries that one byte of a payload may stand for, as in the index of frames."""

_Remainder = Annotated[int, Field(ge=-1, le=15)]
_Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Coded(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Raw(_Coded):
    """A tensor in its ordinary form."""

    coding: Literal["raw"] = "raw"


class Ternary(_Coded):
    """Signs at one scale, zeros elsewhere; ``b`` as in :func:`~merging.sources.packs.frames.frame_signs`."""

    coding: Literal["ternary"] = "ternary"
    b: _Remainder
    scale: _Scale

    def check(self, shape: tuple[int, ...], nbytes: int) -> None:
        """Raise ValueError for a payload that is too short for a tensor of this shape."""
        _check_index(shape, nbytes)

    def decoder(self, shape: tuple[int, ...], payload: Stored) -> Fill:
        """Return a function that fills buffers with elements of the tensor."""
        frames = Frames(_reader(payload), payload.nbytes, prod(shape), self.b, "signs")

        def fill(buffer: Tensor, start: int) -> None:
            buffer.zero_()
            levels = torch.tensor([-self.scale, self.scale], dtype=buffer.dtype)
            for kept, positive in frames.signs(start, start + len(buffer)):
                buffer[torch.from_numpy(kept - start)] = levels[torch.from_numpy(positive).long()]

        return fill


class Sparse(_Coded):
    """Codes of a byte at one scale a group, zeros elsewhere; scales are multiples of ``unit``."""

    coding: Literal["sparse"] = "sparse"
    b: Annotated[int, Field(ge=0, le=15)]
    unit: _Scale

    def check(self, shape: tuple[int, ...], nbytes: int) -> None:
        """Raise ValueError for a payload that is too short for a tensor of this shape."""
        _check_index(shape, nbytes)

    def decoder(self, shape: tuple[int, ...], payload: Stored) -> Fill:
        """Return a function that fills buffers with elements of the tensor."""
        frames = Frames(_reader(payload), payload.nbytes, prod(shape), self.b, "values")

        def fill(buffer: Tensor, start: int) -> None:
            buffer.zero_()
            for kept, values in frames.values(start, start + len(buffer), self.unit):
                buffer[torch.from_numpy(kept - start)] = torch.from_numpy(values).to(buffer.dtype)

        return fill


class Bands(_Coded):
    """Factors whose later directions have fewer bits; directions after the last band are zero.

    The tensor is seen as ``matrices`` ``[n, a, b]``, with directions along ``axis`` 1 or 2. ``bands`` are counts and
    bits, ``checksum`` is the CRC-32 of the payload.
    """

    coding: Literal["bands"] = "bands"
    bands: tuple[tuple[Annotated[int, Field(ge=1)], Literal[8, 4, 2, 1]], ...]
    matrices: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    axis: Literal[1, 2]
    unit: _Scale
    checksum: int

    def check(self, shape: tuple[int, ...], nbytes: int) -> None:
        """Raise ValueError for a payload that is not one of these bands of a tensor of this shape."""
        if prod(self.matrices) != prod(shape):
            raise ValueError(f"is {list(shape)}, and its bands are of {list(self.matrices)}")
        count, length = self.matrices[self.axis], self.matrices[3 - self.axis]
        if sum(each for each, _ in self.bands) > count:
            raise ValueError(f"has {count} directions, and its bands more")
        needed = sum(group_bytes(self.matrices[0] * each, length, bits) for each, bits in self.bands)
        # Directions after the last band take no bytes, and a header may claim any number of them.
        if needed != nbytes or prod(shape) > _MOST * nbytes:
            raise ValueError(f"of {list(shape)} should have {needed} bytes, and has {nbytes}")

    def decoder(self, shape: tuple[int, ...], payload: Stored) -> Fill:
        """Return a function that fills buffers with elements of the tensor; it computes all elements each time."""
        batch, length = self.matrices[0], self.matrices[3 - self.axis]

        def fill(buffer: Tensor, start: int) -> None:
            data = payload.read()
            if crc32(data.numpy().tobytes()) != self.checksum:
                raise ValueError("its checksum does not agree")
            rows, taken, first = torch.zeros(batch, self.matrices[self.axis], length), 0, 0
            for count, bits in self.bands:
                nbytes = group_bytes(batch * count, length, bits)
                piece = unpack_groups(data[taken : taken + nbytes], batch * count, length, bits, self.unit)
                rows[:, first : first + count] = piece.view(batch, count, length)
                taken, first = taken + nbytes, first + count
            flat = (rows if self.axis == 1 else rows.mT).reshape(-1)
            buffer.copy_(flat[start : start + len(buffer)])

        return fill


Coding = Annotated[Raw | Ternary | Sparse | Bands, Field(discriminator="coding")]


class Packed(Derived):
    """A tensor of a pack that is decoded when it is read, piece by piece if its coding allows it.

    ``name`` is its name in messages. Raises ValueError for a payload that does not fit its coding.
    """

    __slots__ = ("_coding", "_fill", "_name", "_payload")

    def __init__(
        self,
        name: str,
        dtype_name: DtypeName,
        shape: tuple[int, ...],
        payload: Stored,
        coding: Ternary | Sparse | Bands,
    ) -> None:
        super().__init__(dtype_name, shape, (payload,))
        if payload.dtype_name != "U8" or len(payload.shape) != 1:
            raise ValueError(f"has a payload {payload.dtype_name} {list(payload.shape)}, and no bytes")
        coding.check(shape, payload.nbytes)
        self._name, self._payload, self._coding = name, payload, coding
        self._fill: Fill | None = None

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        try:
            if self._fill is None:
                self._fill = self._coding.decoder(self.shape, self._payload)
            self._fill(buffer, start)
        except ValueError as error:
            where = self._payload.order()[0]
            raise FormatError(f"{where}: {self._name} {error}: the pack is damaged, get it again") from None

    @property
    def packed_bytes(self) -> int:
        """The bytes that it takes in its file."""
        return self._payload.nbytes


def _check_index(shape: tuple[int, ...], nbytes: int) -> None:
    needed = index_bytes(prod(shape))
    if nbytes < needed:
        raise ValueError(f"of {list(shape)} should have more than {needed} bytes, and has {nbytes}")


def _reader(payload: Stored) -> Callable[[int, int], Bits]:
    def read(start: int, stop: int) -> Bits:
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        payload.read_into(buffer, start)
        return buffer.numpy()

    return read
