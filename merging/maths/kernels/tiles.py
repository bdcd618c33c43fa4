"""Tiles between their type in files and the type of the computation."""

from __future__ import annotations

from typing import Any

from numba import float32, int16, types, uint16, uint32
from numba.extending import overload

from merging.maths.kernels.scalars import bits_of, change_row, decode, encode, kernel, multiply_add

__all__ = ["add_change", "find_extremes", "write_changes"]


def _exponent(value: Any) -> Any:
    """Return the bits of the exponent of a stored number, and the greatest ones that are moderate."""
    raise NotImplementedError("for kernels")


@overload(_exponent, inline="always")
def _exponent_of(value: Any) -> Any:
    def of_bfloat16(value: Any) -> Any:
        return uint16(value & uint16(0x7F80)), uint16(0x7E00)

    def of_float16(value: Any) -> Any:
        return uint16(uint16(value) & uint16(0x7C00)), uint16(0x7800)

    def of_float32(value: Any) -> Any:
        return uint32(bits_of(value) & uint32(0x7F800000)), uint32(0x7E000000)

    return {uint16: of_bfloat16, int16: of_float16}.get(value, of_float32)


@kernel
def find_extremes(values: Any, out: Any) -> None:
    """Write 1 if a number is NaN, infinite, or so large that a difference of two may be infinite, else 0.

    Args:
        values: stored numbers, ``[size]``.
        out: receives the answer, ``[1]`` float32.
    """
    largest, moderate = _exponent(values[0])
    for j in range(len(values)):
        largest = max(largest, _exponent(values[j])[0])
    out[0] = largest > moderate


@kernel
def write_changes(values: Any, base: Any, out: Any) -> None:
    """Write the models' changes.

    Args:
        values: the models' stored values, ``[n, size]``.
        base: the base's, ``[size]``, or None to write the values.
        out: receives the changes, ``[n, size]`` float32.
    """
    for i in range(len(values)):
        change_row(values[i], base, 0, out[i])


def _add_row(values: Any, base: Any, factor: Any, fused: Any, out: Any) -> None:
    """Write the base plus values times a factor; without a base the product."""
    raise NotImplementedError("for kernels")


@overload(_add_row)
def _add_row_of(values: Any, base: Any, factor: Any, fused: Any, out: Any) -> Any:
    if isinstance(base, types.NoneType):

        def multiply(values: Any, base: Any, factor: Any, fused: Any, out: Any) -> None:
            for j in range(len(out)):
                out[j] = encode(values[j] * factor, out[j])

        return multiply

    def add(values: Any, base: Any, factor: Any, fused: Any, out: Any) -> None:
        for j in range(len(out)):
            out[j] = encode(multiply_add(values[j], factor, decode(base[j]), fused), out[j])

    return add


@kernel
def add_change(values: Any, base: Any, factor: Any, fused: Any, out: Any) -> None:
    """Write the base plus a change times a factor, rounded to the type of ``out``; without a base the product."""
    _add_row(values, base, float32(factor), fused, out)
