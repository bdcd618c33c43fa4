"""Directions in few bits: codes of 8, 4, 2 or 1 bits at one scale a group of neighbours.

A code ``c`` of b bits stands for ``(c - (2^b - 1) / 2) * scale``: levels are symmetric about zero, and none is zero.
For the bell-shaped entries of singular vectors this is best where levels are few. Asymmetric levels (a zero point a
group) would only cost bits."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["BITS", "GROUP", "group_bytes", "pack_groups", "unpack_groups"]

BITS = (8, 4, 2, 1)
"""The numbers of bits that a code may have: divisors of 8."""

GROUP = 128
"""Neighbours that share a scale, as in GPTQ's common setting."""

_CLIPPED = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the largest magnitude that are tried first as the outermost level."""

_ROUNDS = 2
"""Least-squares steps from each of these shares."""


def group_bytes(count: int, length: int, bits: int) -> int:
    """Return the bytes of ``count`` directions of a length: codes, then scales of two bytes."""
    return count * (-(-length * bits // 8) + 2 * -(-length // GROUP))


def pack_groups(rows: Tensor, bits: int, unit: float) -> Tensor:
    """Return directions ``[n, length]`` as bytes; scales are stored as float16 in multiples of ``unit``."""
    count, length = rows.shape
    groups = -(-length // GROUP)
    padded = torch.zeros(count, groups * GROUP)
    padded[:, :length] = rows
    values = padded.view(count, groups, GROUP)
    inside = (torch.arange(groups * GROUP) < length).view(groups, GROUP)
    scales = (_scales(values, inside, bits) / unit).to(torch.float16)
    codes = _codes(values, scales.float()[..., None] * unit, bits).view(count, -1)[:, :length].to(torch.uint8)
    return torch.cat([_bytes_of_codes(codes, bits).reshape(-1), scales.reshape(-1).view(torch.uint8)])


def unpack_groups(data: Tensor, count: int, length: int, bits: int, unit: float) -> Tensor:
    """Return the directions ``[n, length]`` (float32) from the bytes of :func:`pack_groups`."""
    groups = -(-length // GROUP)
    stride = -(-length * bits // 8)
    codes = _codes_of_bytes(data[: count * stride].view(count, stride), bits)[:, :length]
    scales = data[count * stride :].clone().view(torch.float16).float().view(count, groups) * unit
    return (codes.float() - _middle(bits)) * scales.repeat_interleave(GROUP, dim=1)[:, :length]


def _middle(bits: int) -> float:
    return ((1 << bits) - 1) / 2


def _codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    safe = torch.where(scales > 0, scales, 1.0)
    return (values / safe + _middle(bits)).round_().clamp_(0, (1 << bits) - 1)


def _scales(values: Tensor, inside: Tensor, bits: int) -> Tensor:
    """Return a scale for each group ``[n, groups, GROUP]``: the best of several local minima of the squared error."""
    middle = _middle(bits)
    widest = values.abs().amax(-1, keepdim=True) / middle
    best, least = widest[..., 0], torch.full(widest.shape[:-1], torch.inf)
    for share in _CLIPPED:
        scale = widest * share
        for _ in range(_ROUNDS):
            levels = (_codes(values, scale, bits) - middle) * inside
            squares = levels.square().sum(-1, keepdim=True)
            scale = torch.where(squares > 0, (values * levels).sum(-1, keepdim=True) / squares, 0.0)
        error = (((_codes(values, scale, bits) - middle) * scale - values) * inside).square().sum(-1)
        better = error < least
        best, least = torch.where(better, scale[..., 0], best), torch.where(better, error, least)
    return best


def _bytes_of_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[n, length]`` side by side in bytes ``[n, ...]``, the first in the highest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    parts = padded.view(len(codes), -1, each)
    found = torch.zeros(parts.shape[:2], dtype=torch.uint8)
    for place in range(each):
        found |= parts[..., place] << (8 - bits * (place + 1))
    return found


def _codes_of_bytes(data: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    parts = [(data >> (8 - bits * (place + 1))) & ((1 << bits) - 1) for place in range(each)]
    return torch.stack(parts, -1).view(len(data), -1)
