"""Opening packed weights: NVFP4, integers of compressed-tensors, GPTQ and AWQ, by the names of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import FormatError, option
from merging.sources.quantized.packed_weights import Awq, Gptq, PackedFloats, PackedIntegers
from merging.sources.quantized.quantized_parts import QuantizedWeight
from merging.sources.stored import Stored

__all__ = ["open_packed"]

_WIDTHS = (2, 4, 8)
"""Bits of codes that fill a word without a rest."""

_INSTEAD = "merge the model it was made from, and quantise the result"


def open_packed(
    path: Path, name: str, tensors: Mapping[str, Stored], stated: Mapping[str, Any], dtype_name: str
) -> tuple[str, QuantizedWeight] | None:
    """Open the packed weight that a tensor is the codes of.

    Args:
        path: the model, for errors.
        name: the name of a tensor.
        tensors: all tensors of the model.
        stated: the config's statement of the quantisation.
        dtype_name: the type of the model's ordinary weights.

    Returns:
        The name of the weight, and the weight with its parts; None for a tensor that is no codes of a packed weight.

    Raises:
        FormatError: for parts that are missing or do not fit, and variants that are not read.
    """
    for ending, open_parts in _KINDS.items():
        if not name.endswith(ending):
            continue
        module = name.removesuffix(ending)
        parts = _PackedParts(path, name, module, tensors)
        found = open_parts(parts, stated, dtype_name)
        if found is not None:
            return f"{module}.weight", QuantizedWeight(found, parts.taken)
    return None


class _PackedParts:
    """The parts of one packed weight; ``taken`` are those that were asked for, and are there."""

    def __init__(self, path: Path, name: str, module: str, tensors: Mapping[str, Stored]) -> None:
        self.path, self.name, self._module, self._tensors = path, name, module, tensors
        self.codes = tensors[name]
        self.taken = {name: self.codes}

    def find(self, ending: str) -> Stored | None:
        """Return a part, None if there is none."""
        name = f"{self._module}.{ending}"
        stored = self._tensors.get(name)
        if stored is not None:
            self.taken[name] = stored
        return stored

    def take(self, ending: str) -> Stored:
        """Return a part. Raises :class:`~merging.errors.FormatError` if there is none."""
        stored = self.find(ending)
        if stored is None:
            raise FormatError(
                f"{self.path}: {self.name} is quantised, and its {ending} is missing: get the model again"
            )
        return stored

    def check(self, fits: bool, part: str) -> None:
        """Raise :class:`~merging.errors.FormatError` for a part that does not fit the codes."""
        if not fits:
            shape = tuple(self._tensors[f"{self._module}.{part}"].shape)
            raise FormatError(
                f"{self.path}: {self.name} has the shape {tuple(self.codes.shape)} and its {part} {shape}, which does "
                f"not fit: {_INSTEAD}"
            )

    def refuse(self, kind: str) -> FormatError:
        """Return the error for a variant that is not read."""
        return FormatError(
            f"{self.path}: is quantised ({kind}, says {self.name}): {option('dequantize', True)} does not understand "
            f"this variant: {_INSTEAD}"
        )


def _open_floats(parts: _PackedParts, dtype_name: str, whole: Stored | None, divides: bool) -> PackedFloats:
    scales = parts.take("weight_scale")
    inputs = 2 * parts.codes.shape[-1]
    fits = scales.shape[:-1] == parts.codes.shape[:-1] and scales.shape[-1] and inputs % (2 * scales.shape[-1]) == 0
    parts.check(bool(fits), "weight_scale")
    if scales.dtype_name not in ("F8_E4M3", "F8_E8M0", "U8"):
        raise parts.refuse(f"codes of 4 bits with scales in {scales.dtype_name}")
    return PackedFloats(dtype_name, parts.codes, scales, whole, divides)


def _open_modelopt(parts: _PackedParts, stated: Mapping[str, Any], dtype_name: str) -> PackedFloats | None:
    """Open NVFP4 as modelopt writes it."""
    whole = parts.find("weight_scale_2")
    if whole is None or parts.codes.dtype_name != "U8" or len(parts.codes.shape) < 2:
        return None
    parts.check(whole.numel == 1, "weight_scale_2")
    return _open_floats(parts, dtype_name, whole, divides=False)


def _open_compressed(parts: _PackedParts, stated: Mapping[str, Any], dtype_name: str) -> PackedFloats | PackedIntegers:
    """Open packed weights of compressed-tensors: floats or integers."""
    codes = parts.codes
    if codes.dtype_name == "U8" and len(codes.shape) >= 2:
        whole = parts.find("weight_global_scale")
        if whole is not None:
            parts.check(whole.numel == 1, "weight_global_scale")
        return _open_floats(parts, dtype_name, whole, divides=True)
    if codes.dtype_name != "I32" or len(codes.shape) != 2:
        raise parts.refuse(f"compressed-tensors, {codes.dtype_name} of {len(codes.shape)} axes")
    size = parts.take("weight_shape")
    shape = tuple(int(each) for each in size.read().flatten().tolist()) if 0 < size.numel < 8 else ()
    bits = _bits_of(codes.shape[1], shape[1] if len(shape) == 2 else 0)
    parts.check(len(shape) == 2 and shape[0] == codes.shape[0] and bits > 0, "weight_shape")
    if bits not in _WIDTHS:
        raise parts.refuse(f"compressed-tensors, {bits} bits")
    scales = parts.take("weight_scale")
    groups = scales.numel // max(1, shape[0])
    fits = scales.shape in ((shape[0], groups), (shape[0],)) and groups > 0 and shape[1] % groups == 0
    parts.check(fits and scales.floating, "weight_scale")
    zeros = parts.find("weight_zero_point")
    if zeros is not None:
        wanted = (-(-shape[0] * bits // 32), groups)
        parts.check(zeros.dtype_name == "I32" and zeros.shape == wanted, "weight_zero_point")
    of = _find_groups(parts, "weight_g_idx", shape[1])
    return PackedIntegers(
        dtype_name, (shape[0], shape[1]), bits=bits, codes=codes, scales=scales, zeros=zeros, groups=of
    )


def _bits_of(words: int, inputs: int) -> int:
    """Return the bits of a code in a row of words, 0 if there is no such number."""
    return next((bits for bits in range(1, 9) if inputs > 0 and -(-inputs * bits // 32) == words), 0)


def _find_groups(parts: _PackedParts, ending: str, inputs: int) -> Stored | None:
    of = parts.find(ending)
    if of is not None:
        parts.check(of.dtype_name in ("I32", "I64") and of.shape == (inputs,), ending)
    return of


def _open_words(parts: _PackedParts, stated: Mapping[str, Any], dtype_name: str) -> Gptq | Awq:
    """Open a weight of GPTQ or AWQ: their parts have the same names, and the shapes show which it is."""
    codes, scales, zeros = parts.codes, parts.take("scales"), parts.take("qzeros")
    words = all(each.dtype_name == "I32" and len(each.shape) == 2 for each in (codes, zeros))
    if not words or len(scales.shape) != 2 or not scales.floating or not codes.numel:
        raise parts.refuse("GPTQ or AWQ of other types or axes")
    method = str(stated.get("quant_method", ""))
    groups, outputs = scales.shape
    parts.check(zeros.shape[0] == groups > 0, "qzeros")
    if method == "awq" or (not method and codes.shape[1] * 8 == outputs != codes.shape[1]):
        if stated.get("bits", stated.get("w_bit", 4)) != 4 or str(stated.get("version", "gemm")).lower() != "gemm":
            raise parts.refuse(f"AWQ, version {stated.get('version')}, {stated.get('bits')} bits")
        parts.check(outputs == codes.shape[1] * 8 and codes.shape[0] % groups == 0, "scales")
        parts.check(zeros.shape[1] == codes.shape[1], "qzeros")
        return Awq(dtype_name, codes=codes, scales=scales, zeros=zeros)
    bits = stated.get("bits", 32 * zeros.shape[1] // max(1, outputs))
    kind = str(stated.get("checkpoint_format", "gptq"))
    if method not in ("", "gptq") or bits not in _WIDTHS or kind not in ("gptq", "gptq_v2"):
        raise parts.refuse(f"{method or 'GPTQ'}, {bits} bits, {kind}")
    inputs = codes.shape[0] * 32 // bits
    parts.check(outputs == codes.shape[1] and inputs % groups == 0, "scales")
    parts.check(zeros.shape[1] * 32 == outputs * bits, "qzeros")
    of = _find_groups(parts, "g_idx", inputs)
    more = 1 if kind == "gptq" else 0
    return Gptq(dtype_name, bits=bits, codes=codes, scales=scales, zeros=zeros, groups=of, more=more)


_KINDS = {".qweight": _open_words, ".weight_packed": _open_compressed, ".weight": _open_modelopt}
"""Functions that open packed weights, by the ending of the names of their codes."""
