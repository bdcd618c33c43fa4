"""Weights of bitsandbytes in 4 bits (NF4 and FP4), read as ordinary numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.derived import Derived
from merging.sources.dtypes import DTYPE_NAMES, DTYPES
from merging.sources.header import DTYPE_BITS
from merging.sources.quantized.bitsandbytes_codes import dequantize_blocks, dequantize_scales
from merging.sources.small_files import parse_json
from merging.sources.stored import Stored

__all__ = ["FourBit", "open_four_bit", "parts_of"]

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_PIECE = 1 << 17
_LARGEST = 1 << 14


class FourBit(Derived):
    """A weight of two codes a byte, the high four bits first, flat in blocks that share a scale.

    ``value = quant_map[code] * absmax`` is computed in float32 and rounded once, as bitsandbytes does. With double
    quantisation a scale is ``nested_quant_map[absmax] * nested_absmax + offset``.
    """

    __slots__ = ("_codes", "_map", "_nested", "_offset", "_scales", "_steps")

    def __init__(self, codes: Stored, parts: Mapping[str, Stored], state: Mapping[str, Any]) -> None:
        nested = (parts["nested_absmax"], parts["nested_quant_map"]) if "nested_blocksize" in state else ()
        dtype_name = DTYPE_NAMES[getattr(torch, state["dtype"])]
        super().__init__(dtype_name, tuple(state["shape"]), (codes, parts["absmax"], parts["quant_map"], *nested))
        self._codes, self._scales, self._map, self._nested = codes, parts["absmax"], parts["quant_map"], nested
        self._steps = state["blocksize"], state.get("nested_blocksize", 1)
        self._offset = float(state.get("nested_offset", 0.0))

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        for first in range(0, len(buffer), _PIECE):
            piece = buffer[first : first + _PIECE]
            piece.copy_(self._values(start + first, len(piece)))

    def _values(self, start: int, count: int) -> Tensor:
        stop, size = start + count, DTYPE_BITS[self._codes.dtype_name] // 8
        first, last = start // (2 * size), -(-stop // (2 * size))  # elements of the storage, which may be wider
        raw = torch.empty(last - first, dtype=self._codes.dtype)
        self._codes.read_into(raw, first)
        packed = raw.view(torch.uint8).int()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[start - first * 2 * size :][:count]
        block = self._steps[0]
        blocks = range(start // block, -(-stop // block))
        scales = self._block_scales(blocks).repeat_interleave(block)[start - blocks.start * block :][:count]
        return dequantize_blocks(codes, self._map.read(), scales)

    def _block_scales(self, blocks: range) -> Tensor:
        raw = torch.empty(len(blocks), dtype=self._scales.dtype)
        self._scales.read_into(raw, blocks.start)
        if not self._nested:
            return raw.float()
        absmax, table = self._nested
        step = self._steps[1]
        groups = torch.empty(-(-blocks.stop // step) - blocks.start // step, dtype=absmax.dtype)
        absmax.read_into(groups, blocks.start // step)
        places = torch.arange(blocks.start, blocks.stop) // step - blocks.start // step
        return dequantize_scales(raw.int(), table.read(), groups.float()[places], self._offset)

    def advise(self, start: int, count: int) -> None:
        size = 2 * DTYPE_BITS[self._codes.dtype_name] // 8
        self._codes.advise(start // size, -(-count // size))


def parts_of(name: str, tensors: Mapping[str, Stored]) -> list[str]:
    """Return the names of the tensors that belong to a weight in 4 bits; none of another tensor."""
    if not any(name + state in tensors for state in _STATES):
        return []
    return [name + part for part in _PARTS if name + part in tensors]


def open_four_bit(path: Path, name: str, tensors: Mapping[str, Stored]) -> FourBit:
    """Open a weight in 4 bits. Its state, which has the shape, is read: on the Hub the file is downloaded for it.

    Raises :class:`~merging.errors.FormatError` for parts that are missing or do not fit.
    """
    found = parts_of(name, tensors)
    parts = {each.removeprefix(f"{name}."): tensors[each] for each in found}
    stored = tensors[next(each for each in found if each.endswith(_STATES))]
    if stored.dtype_name != "U8" or stored.numel > _LARGEST:
        raise FormatError(f"{path}: the state of {name} is not one of bitsandbytes")
    state = parse_json(bytes(stored.read().flatten().tolist()).decode(errors="replace"), f"{path}: the state of {name}")
    wrong = next((part for part in _wrong_parts(tensors[name], parts, state)), None)
    if wrong is not None:
        raise FormatError(f"{path}: {name} is quantised by bitsandbytes, and its {wrong} is missing or does not fit")
    return FourBit(tensors[name], parts, state)


def _wrong_parts(codes: Stored, parts: Mapping[str, Stored], state: Mapping[str, Any]) -> list[str]:
    """Return the names of parts that are missing or do not fit; "state" first."""
    nested = "nested_blocksize" in state
    sizes = [state.get("blocksize"), *([state["nested_blocksize"]] if nested else [])]
    shape = state["shape"] if isinstance(state.get("shape"), list) else [0]
    known = state.get("dtype") in ("float16", "bfloat16", "float32")
    plain = all(type(each) is int and each > 0 for each in (*sizes, *shape))
    offset = state.get("nested_offset", 0.0)
    if not known or not plain or not isinstance(offset, (int, float)):
        return ["state"]
    count = prod(shape)
    blocks = -(-count // sizes[0])
    wanted = {"absmax": blocks, "quant_map": 16}
    if nested:
        wanted |= {"nested_absmax": -(-blocks // sizes[1]), "nested_quant_map": 256}
    wrong = [part for part, size in wanted.items() if part not in parts or parts[part].numel != size]
    if not wrong and (parts["absmax"].dtype_name == "U8") != nested:
        wrong = ["absmax"]
    return wrong or (
        [] if codes.dtype_name in DTYPES and -(-count // 2) <= codes.nbytes < count // 2 + 4 else ["codes"]
    )
