"""Random draws that belong to an element: the same on every device, in any order, for any cut into blocks."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from math import pi

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["draw_key", "draw_limit", "draw_mask", "draw_normal", "draw_uniform"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
_WORD = 1 << 32


def draw_mask(
    share: float, start: int, count: int, device: torch.device, *place: object, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw which of ``count`` elements from position ``start`` on are kept, each with probability ``share``.

    The draws depend on the position and on ``place`` (seed, model, tensor) alone.

    Returns:
        ``[count]`` of 0 and 1 in ``dtype``, by default boolean. To multiply by floats takes a third of the time of a
        boolean mask.
    """
    dtype = torch.bool if dtype is None else dtype
    if share >= 1:
        return torch.ones(count, dtype=dtype, device=device)
    bits = _bits(start, count, device, *place)
    return torch.lt(bits, draw_limit(share), out=torch.empty(count, dtype=dtype, device=device))


def draw_limit(share: float) -> int:
    """Return the number that random bits, read as signed, are below with probability ``share``."""
    return round(share * _WORD) - _WORD // 2


def draw_key(start: int, *place: object) -> tuple[int, int]:
    """Return the key of the random bits at a position and up to the next multiple of 2**32: two words of 32 bits."""
    digest = sha256("\0".join(map(str, (*place, start // _WORD))).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def draw_uniform(start: int, count: int, device: torch.device, *place: object) -> Tensor:
    """Draw a number in [0, 1), a multiple of 2**-24, for each element: ``[count]`` float32.

    The arguments are the same as for :func:`draw_mask`.
    """
    return (_bits(start, count, device, *place) >> 8).float().add_(1 << 23).mul_(2.0**-24)


def draw_normal(start: int, count: int, device: torch.device, *place: object) -> Tensor:
    """Draw a standard normal number for each element, by Box and Muller: ``[count]`` float32.

    The arguments are the same as for :func:`draw_mask`.
    """
    radius = draw_uniform(start, count, device, *place, "radius")
    angle = draw_uniform(start, count, device, *place, "angle")
    return radius.neg_().log1p_().mul_(-2).sqrt_().mul_(angle.mul_(2 * pi).cos_())


def _bits(start: int, count: int, device: torch.device, *place: object) -> Tensor:
    """Return random bits ``[count]`` int32.

    A hash of the position: two rounds of multiply and shift with constants after Wellons (lowbias32), keyed by SHA-256
    of the place, in 32-bit integers that wrap.
    """
    rest = _WORD - start % _WORD
    if count > rest:  # the upper half of the position is part of the key
        return torch.cat([_bits(start, rest, device, *place), _bits(start + rest, count - rest, device, *place)])
    first, second = draw_key(start, *place)
    bits = _steps(count, device) + _to_signed(start * _GOLDEN + first)
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_to_signed(_FIRST)).bitwise_xor_(_to_signed(second))
    return bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_to_signed(_SECOND))


@lru_cache(maxsize=2)
def _steps(count: int, device: torch.device) -> Tensor:
    """Return multiples of an odd constant, the same for all tiles of a size: ``[count]``."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(_to_signed(_GOLDEN))


def _to_signed(value: int) -> int:
    """Return a number modulo 2**32 as a signed integer of 32 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
