"""What wrappers have in common that hand on changes as they are in bases which all of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.families.spectral import as_stored, matrices

__all__ = ["InBasis", "Turned", "turned"]

Turned = tuple[list[Delta], Callable[[Tensor], tuple[Tensor, Tensor]]]
"""The changes in shared bases, and what makes of their merge the factors ``up @ down`` of the change it stands for."""


class InBasis(Wrapper):
    """Matrices are merged as they are in shared bases, low-rank changes into low-rank ones whatever is inside.

    Vectors, convolutions and embedding tables that come in full, and experts, pass as they are.
    """

    needs_whole: ClassVar[bool] = True
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 6

    @property
    def factored(self) -> bool:
        return True

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind == "matrix" else self.then.grain_at(site)

    @abstractmethod
    def turn(self, changes: list[Delta], dtype: torch.dtype) -> Turned:
        """The changes, matrices ``[out, in]``, in their bases, in a type; and the way back."""

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = _coordinates(stack, site)
        if changes is None:
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        inside, factors = self.turn(changes, stack.dtype)
        side = site.side or min(changes[0].shape)
        place = replace(site, shape=inside[0].shape, axis=1, start=0, side=side)
        inner = Stack(inside, stack.models, stack.present)
        return Unwrapped(self.then, inner, place, lambda merged: _back(*factors(merged.dense()), stack, site))


def _coordinates(stack: Stack, site: Site) -> list[Delta] | None:
    """The changes as matrices ``[out, in]``: factors, whatever they belong to, or full matrices; None for what is no
    matrix."""
    if stack.low_rank:
        low = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        if low[0].up.dim() > 2:
            return None
        return [LowRank(delta.up, delta.down, (len(delta.up), delta.down.shape[1])) for delta in low]
    if site.kind != "matrix":
        return None
    return [Dense(value) for value in matrices(stack.dense(), site)]


def _back(up: Tensor, down: Tensor, stack: Stack, site: Site) -> Delta:
    """``up @ down`` as the stack's changes are: factors for factors, else in full as the tensor lies."""
    first = stack.deltas[0]
    if stack.low_rank and isinstance(first, LowRank):
        return LowRank(up, down, first.shape, first.transposed)
    return Dense(as_stored(up @ down, site))


def turned(change: Delta) -> Delta:
    """A matrix's change transposed."""
    if isinstance(change, LowRank):
        return LowRank(change.down.mT, change.up.mT, change.shape[::-1])
    return Dense(change.value.mT)
