"""Random numbers that depend on a seed and on what they are for, never on what was drawn before."""

from __future__ import annotations

from hashlib import sha256

import torch

__all__ = ["batch", "generator", "order"]


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for each purpose."""
    digest = sha256("\0".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def order(count: int, seed: int, *purpose: object) -> list[int]:
    """A random order of so many things."""
    positions: list[int] = torch.randperm(count, generator=generator(seed, *purpose)).tolist()
    return positions


def batch(step: int, size: int, count: int, seed: int) -> list[int]:
    """The positions of a step's examples: all are seen once before any is seen again, in a new order each time.

    Follows from the step alone, so that training goes on after a stop as if there had been none.
    """
    return [order(count, seed, "epoch", at // count)[at % count] for at in range(step * size, (step + 1) * size)]
