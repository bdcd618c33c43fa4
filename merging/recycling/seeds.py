"""Random numbers that depend on a seed and a purpose, never on earlier draws."""

from __future__ import annotations

from hashlib import sha256

from merging.maths.lazy_torch import torch

__all__ = ["batch", "generator", "order"]


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Return a separate generator for each purpose."""
    digest = sha256("\0".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def order(count: int, seed: int, *purpose: object) -> list[int]:
    """Return a random order of ``count`` things."""
    positions: list[int] = torch.randperm(count, generator=generator(seed, *purpose)).tolist()
    return positions


def batch(step: int, size: int, count: int, seed: int) -> list[int]:
    """Return the positions of a step's examples. An epoch covers all examples, in a new order each time.

    The result depends on the step alone, so that training continues after an interruption as if there had been none.
    """
    return [order(count, seed, "epoch", at // count)[at % count] for at in range(step * size, (step + 1) * size)]
