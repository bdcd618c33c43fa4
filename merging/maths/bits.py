"""Masks in one bit an element."""

from __future__ import annotations

from math import prod

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask of 0 and 1, of any shape and type, in one bit an element: ``[ceil(elements / 8)]`` uint8.

    Bit k of byte i is element ``k * ceil(elements / 8) + i``.
    """
    flat = mask.reshape(-1)
    size = -(-len(flat) // 8)
    packed = torch.zeros(size, dtype=torch.uint8, device=mask.device)
    for bit, part in enumerate(torch.split(flat, max(1, size))):
        packed[: len(part)].bitwise_or_(part.to(torch.uint8).bitwise_left_shift_(bit))
    return packed


def unpack_bits(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the mask ``[*shape]`` of :func:`pack_bits`, as 0 and 1 in a type."""
    mask = torch.empty(prod(shape), dtype=dtype, device=packed.device)
    for bit, part in enumerate(torch.split(mask, max(1, len(packed)))):
        torch.ne(packed[: len(part)].bitwise_and(1 << bit), 0, out=part)
    return mask.view(shape)
