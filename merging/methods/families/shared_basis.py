"""Base class of wrappers that express all changes in a shared basis before merging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.families.spectral import as_stored, matrices

__all__ = ["Coordinates", "SharedBasis", "transpose"]

Coordinates = tuple[list[Delta], Callable[[Tensor], tuple[Tensor, Tensor]]]
"""The changes in shared bases, and a function from their merge to the factors ``up @ down`` of the merged change."""


class SharedBasis(Wrapper):
    """A wrapper that merges matrices in shared bases; low-rank changes stay low-rank, whatever is inside.

    Vectors, convolutions and embedding tables in full, and experts, pass unchanged.
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
    def change_basis(self, changes: list[Delta], dtype: torch.dtype) -> Coordinates:
        """Return the changes, matrices ``[out, in]``, in shared bases of a type, and the way back."""

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = _as_matrices(stack, site)
        if changes is None:
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        inside, factors = self.change_basis(changes, stack.dtype)
        side = site.side or min(changes[0].shape)
        place = replace(site, shape=inside[0].shape, axis=1, start=0, side=side)
        inner = Stack(inside, stack.models, stack.present)
        return Unwrapped(self.then, inner, place, lambda merged: _back(*factors(merged.dense()), stack, site))


def _as_matrices(stack: Stack, site: Site) -> list[Delta] | None:
    """Return the changes as matrices ``[out, in]``: factors of any tensor, or full matrices; None for other tensors."""
    if stack.low_rank:
        low = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        if low[0].up.dim() > 2:
            return None
        return [LowRank(delta.up, delta.down, (len(delta.up), delta.down.shape[1])) for delta in low]
    if site.kind != "matrix":
        return None
    return [Dense(value) for value in matrices(stack.dense(), site)]


def _back(up: Tensor, down: Tensor, stack: Stack, site: Site) -> Delta:
    """Return ``up @ down`` in the form of the stack's changes: as factors, or in full in the layout of the tensor."""
    first = stack.deltas[0]
    if stack.low_rank and isinstance(first, LowRank):
        return LowRank(up, down, first.shape, first.transposed)
    return Dense(as_stored(up @ down, site))


def transpose(change: Delta) -> Delta:
    """Return a matrix's change transposed."""
    if isinstance(change, LowRank):
        return LowRank(change.down.mT, change.up.mT, change.shape[::-1])
    return Dense(change.value.mT)
