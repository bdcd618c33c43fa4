"""Base class of wrappers that express all changes in a shared basis before merging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from merging.errors import OptionError
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped
from merging.methods.families.spectral import as_stored
from merging.methods.families.whole_matrices import WholeMatrices, as_matrices

__all__ = ["Coordinates", "SharedBasis"]

Coordinates = tuple[list[Delta], Callable[[Tensor], tuple[Tensor, Tensor]]]
"""The changes in shared bases, and a function from their merge to the factors ``up @ down`` of the merged change."""


class SharedBasis(WholeMatrices):
    """A wrapper that merges matrices in shared bases; low-rank changes stay low-rank, whatever is inside.

    Vectors, convolutions and embedding tables in full, and experts, pass unchanged.
    """

    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"

    @property
    def factored(self) -> bool:
        return True

    def merged_rank(self, ranks: Sequence[int]) -> int:
        return sum(ranks)

    def check(self, models: int) -> None:
        super().check(models)
        for link in self.then.links():
            if link.needs_statistics:
                raise OptionError(
                    f"{link.name} needs statistics of a layer's own inputs, and {self.name} expresses changes in a "
                    f"shared basis: use {link.name} without {self.name}"
                )

    @abstractmethod
    def change_basis(self, changes: list[Delta], dtype: torch.dtype) -> Coordinates:
        """Return the changes, matrices ``[out, in]``, in shared bases of a type, and the way back."""

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = as_matrices(stack, site)
        if changes is None:
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        inside, factors = self.change_basis(changes, stack.dtype)
        side = site.side or min(changes[0].shape)
        place = replace(site, shape=inside[0].shape, axis=1, start=0, side=side)
        inner = Stack(inside, stack.models, stack.present)
        return Unwrapped(self.then, inner, place, lambda merged: _back(*factors(merged.dense()), stack, site))


def _back(up: Tensor, down: Tensor, stack: Stack, site: Site) -> Delta:
    """Return ``up @ down`` in the form of the stack's changes: as factors, or in full in the layout of the tensor."""
    first = stack.deltas[0]
    if stack.low_rank and isinstance(first, LowRank):
        return LowRank(up, down, first.shape, first.transposed)
    return Dense(as_stored(up @ down, site))
