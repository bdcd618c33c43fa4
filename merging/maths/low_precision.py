"""Numbers of eight and four bits: codes to numbers and numbers to codes, and the scales that many codes share."""

from __future__ import annotations

from itertools import pairwise

from merging.maths.lazy_torch import Tensor, torch

__all__ = [
    "E2M1",
    "LIMITS",
    "exponents_of",
    "from_codes",
    "from_exponents",
    "from_pairs",
    "to_codes",
    "to_exponents",
    "to_pairs",
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that four bits stand for; the highest bit is the sign."""

LIMITS = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "F8_E4M3FNUZ": 240.0, "F8_E5M2FNUZ": 57344.0, "I8": 127.0}
"""The largest number of each type of codes of one byte, by the type's name in files."""

_BIAS = 127
"""The bias of an exponent of two that is stored as a byte; the byte 255 stands for no number."""

_ROUNDED_UP = 0.875
"""The mantissa (of 0.5 to 1) from which a group's largest number, at most 8, would be cut off at 6 by more than 1."""


def from_codes(codes: Tensor) -> Tensor:
    """Return codes of one byte as float32."""
    if codes.dtype == torch.int8:
        return codes.float()
    # looked up, which is four times as fast as converting them
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def to_codes(values: Tensor, dtype: torch.dtype, limit: float) -> Tensor:
    """Return the nearest codes to float32 numbers, which are used up; numbers beyond the limit become the limit."""
    values.clamp_(-limit, limit)
    return values.round_().to(dtype) if dtype == torch.int8 else values.to(dtype)


def from_exponents(exponents: Tensor) -> Tensor:
    """Return 2 to the power of each exponent, which is stored as a byte, plus 127: float32."""
    table = torch.ldexp(torch.ones(256), torch.arange(256) - _BIAS)
    return table.index_select(0, exponents.reshape(-1).int()).view(exponents.shape)


def to_exponents(scales: Tensor) -> Tensor:
    """Return the smallest powers of two that are not below float32 scales, as stored exponents: uint8."""
    mantissa, exponent = torch.frexp(scales)
    return (exponent - (mantissa == 0.5).int() + _BIAS).clamp_(0, 2 * _BIAS).to(torch.uint8)


def exponents_of(largest: Tensor) -> Tensor:
    """Return the exponents of MXFP4 groups from the largest magnitude of each: uint8.

    A group's numbers divided by 2 to the exponent are below 7, so that 6, the largest code, is at most half a step
    away. A group of zeros has the scale 1.
    """
    mantissa, exponent = torch.frexp(largest)
    stored = exponent - 3 + (mantissa >= _ROUNDED_UP).int() + _BIAS
    return torch.where(largest > 0, stored.clamp_(0, 2 * _BIAS), _BIAS).to(torch.uint8)


def from_pairs(codes: Tensor) -> Tensor:
    """Return bytes ``[..., n]`` of two codes each as float32 ``[..., 2 n]``, the low four bits first."""
    values = torch.tensor([*E2M1, *(-each for each in E2M1)])
    table = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    return table.index_select(0, codes.reshape(-1).int()).view(*codes.shape[:-1], -1)


def to_pairs(values: Tensor) -> Tensor:
    """Return float32 numbers ``[..., 2 n]`` as bytes ``[..., n]`` of two codes each, the low four bits first.

    Numbers between two codes become the nearer one, halfway the even one, and numbers beyond 6 become 6.
    """
    middles = [(low + high) / 2 for low, high in pairwise(E2M1)]
    edges = torch.tensor(middles)
    below = torch.nextafter(edges, torch.zeros(()))  # halfway numbers belong to the code above where that is even
    edges = torch.where(torch.arange(len(edges)) % 2 == 1, below, edges)
    codes = torch.bucketize(values.abs(), edges, out_int32=True).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
