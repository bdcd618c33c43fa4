"""Sketches of changes: a few hundred numbers whose cosines estimate the cosines of changes, to find duplicates."""

from __future__ import annotations

import hashlib

from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch

__all__ = ["LENGTH", "empty", "sketch"]

LENGTH = 256
"""The numbers in a sketch."""

_PROBES = 16
"""The numbers to which each module contributes. Random numbers are the main cost of a sketch."""


def empty() -> Tensor:
    """Return the sketch of a zero change, float64 ``[LENGTH]``."""
    return torch.zeros(LENGTH, dtype=torch.float64)


def sketch(name: str, delta: Delta) -> Tensor:
    """Return a module's part of an adapter's sketch, float64 ``[LENGTH]``.

    A number is ``u^T D v`` with normal ``u`` and ``v``, seeded by the module's name. For factors it is
    ``(u^T up)(down v)``, so that they are not multiplied out. Sketches are linear in the changes. Their inner products
    equal the inner products of the changes up to noise (Johnson and Lindenstrauss), so duplicates have a cosine of 1.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    if isinstance(delta, LowRank) and delta.up.dim() == 2:
        left, right = _normal(generator, len(delta.up)), _normal(generator, delta.down.shape[1])
        found = ((left @ delta.up.float()) * (right @ delta.down.float().mT)).sum(1)
    else:
        matrix = delta.dense().float()
        matrix = matrix.reshape(len(matrix) if matrix.dim() else 1, -1)
        left, right = _normal(generator, len(matrix)), _normal(generator, matrix.shape[1])
        found = ((left @ matrix) * right).sum(1)
    total = empty()
    total[torch.randperm(LENGTH, generator=generator)[:_PROBES]] = found.double()
    return total


def _normal(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(_PROBES, size, generator=generator)
