"""Sketches of changes: a few hundred numbers whose cosines estimate those of the changes, for finding near-repeats."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from merging.maths.delta import Delta, LowRank

__all__ = ["LENGTH", "empty", "sketch"]

LENGTH = 256
"""Numbers in a sketch."""

_PROBES = 16
"""Of which each module adds to so many: generating random numbers is what a sketch costs."""


def empty() -> Tensor:
    """The sketch of no change, float64 ``[LENGTH]``."""
    return torch.zeros(LENGTH, dtype=torch.float64)


def sketch(name: str, delta: Delta) -> Tensor:
    """What a module's change adds to the sketch of an adapter, float64 ``[LENGTH]``.

    A number is ``u^T D v`` with normal ``u`` and ``v``, whose seed is the module's name: of factors
    ``(u^T up)(down v)``, so that nothing is written out. Sketches are linear in the changes, and their inner products
    are those of the changes but for noise (Johnson and Lindenstrauss), so that repeats have a cosine of 1.
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
