"""Numbers inside compiled loops: decoded, encoded, and rounded as torch rounds them.

Arrays of uint16 hold bfloat16, arrays of int16 hold float16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int16, njit, types, uint16, uint32
from numba.extending import intrinsic, overload

__all__ = ["bits_of", "change_row", "decode", "encode", "kernel", "multiply_add"]

kernel = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)
"""Decorator of kernels, and of functions that they call without inlining them.

Sums are not reordered, and products are fused by :func:`multiply_add` alone. Nothing of numba or Python is called, so
that the code runs without them: kernels work in the space that they are given, and cannot allocate any.
"""


def _bitcast(to: Any, llvm: Any) -> Any:
    def make(context: Any, value: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm)

        return to(value), generate

    return intrinsic(make)


bits_of = _bitcast(uint32, ir.IntType(32))
"""The bits of a float32."""

_float_of = _bitcast(float32, ir.FloatType())
"""The float32 of some bits."""


@intrinsic
def _half_to_float(context: Any, value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return float32(int16), generate


@intrinsic
def _float_to_half(context: Any, value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return int16(float32), generate


@intrinsic
def _round_once(context: Any, x: Any, y: Any, z: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return float32(float32, float32, float32), generate


@njit(inline="always")
def multiply_add(x: Any, y: Any, z: Any, fused: Any) -> Any:
    """Return ``x y + z``, rounded once if ``fused``: as torch's sums with a factor do."""
    return _round_once(x, y, z) if fused else x * y + z


def decode(value: Any) -> Any:
    """Return an element of an array as float32."""
    raise NotImplementedError("for kernels")


@overload(decode, inline="always")
def _decode(value: Any) -> Any:
    def from_bfloat16(value: Any) -> Any:
        return _float_of(uint32(uint32(value) << uint32(16)))  # shifts are of 64 bits

    def from_float16(value: Any) -> Any:
        return _half_to_float(value)

    def from_float32(value: Any) -> Any:
        return value

    return {uint16: from_bfloat16, int16: from_float16}.get(value, from_float32)


def encode(value: Any, like: Any) -> Any:
    """Return a float32 as an element of an array, which ``like`` is one of: the nearest number, halfway the even."""
    raise NotImplementedError("for kernels")


@overload(encode, inline="always")
def _encode(value: Any, like: Any) -> Any:
    def to_bfloat16(value: Any, like: Any) -> Any:
        bits = bits_of(value)
        return uint16((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))

    def to_float16(value: Any, like: Any) -> Any:
        return _float_to_half(value)

    def to_float32(value: Any, like: Any) -> Any:
        return value

    return {uint16: to_bfloat16, int16: to_float16}.get(like, to_float32)


def change_row(values: Any, base: Any, first: Any, out: Any) -> None:
    """Write a model's changes of some elements: its values, minus the base's unless that is None.

    Args:
        values: the model's values of the tile.
        base: the base's values of the tile, or None.
        first: the first element.
        out: receives as many changes as it is long.
    """
    raise NotImplementedError("for kernels")


@overload(change_row)
def _change_row(values: Any, base: Any, first: Any, out: Any) -> Any:
    if isinstance(base, types.NoneType):

        def copy(values: Any, base: Any, first: Any, out: Any) -> None:
            own = values[first : first + len(out)]
            for j in range(len(out)):
                out[j] = decode(own[j])

        return copy

    def subtract(values: Any, base: Any, first: Any, out: Any) -> None:
        own, origin = values[first : first + len(out)], base[first : first + len(out)]
        for j in range(len(out)):
            out[j] = decode(own[j]) - decode(origin[j])

    return subtract
