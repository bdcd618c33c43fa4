"""KnOTS: the models' changes in one basis of outputs, before any method."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from merging.delta import Delta, Dense, LowRank, Stack
from merging.linalg import output_basis
from merging.method import Grain, Seen
from merging.site import Site
from merging.spectral import as_stored, matrices
from merging.wrapper import Entered, Wrapper

__all__ = ["Knots", "back", "coordinates", "inner_site", "turned"]


class Knots(Wrapper):
    """Knowledge orientation through SVD: [tau_1 .. tau_n] = U S [V_1^T .. V_n^T], and S V_i^T is merged for tau_i.

    Adapters of different tasks hardly share a basis, so that comparing them entry by entry (`ties`, `dare`, `magmax`)
    compares what does not belong together; in the basis U of what all of them write it does: `knots+ties`. The merge M
    of the S V_i^T comes back as U M. Singular values below 1e-6 of the largest are left out; each vector of U has its
    largest entry positive. `align = inputs` puts the changes on top of each other instead. Around a sum it changes
    nothing.

    On adapters exact and low-rank whatever is inside: the merged adapter has at most the sum of the ranks, and
    thresholds that a method inside takes over the whole model are those of the coordinates. Matrices of full
    checkpoints cost an eigenvalue problem of their outputs, anew in each sweep of the method inside over the model
    (`--scope tensor` needs one); vectors, convolutions and embedding tables in full pass as they are.
    """

    name: ClassVar[str] = "knots"
    summary: ClassVar[str] = "changes in one common basis of outputs"
    paper: ClassVar[str] = "KnOTS, Stoica et al. 2025, arXiv 2410.19735"
    takes_apart: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    long_side: ClassVar[bool] = True
    workspace: ClassVar[int] = 6

    align: Literal["outputs", "inputs"] = Field("outputs", description="which side the common basis is of")

    @property
    def factored(self) -> bool:
        return True

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind == "matrix" else self.then.grain_at(site)

    def enter(self, stack: Stack, site: Site, seen: Seen) -> Entered:
        changes = coordinates(stack, site)
        if changes is None:
            return Entered(self.then, stack, site, lambda merged: merged)
        turn = self.align == "inputs"
        sides = [turned(change) for change in changes] if turn else changes
        basis = output_basis(sides).to(stack.dtype)
        inside = [_onto(basis, change) for change in sides]
        inside = [turned(change) for change in inside] if turn else inside

        def leave(merged: Delta) -> Delta:
            core = merged.dense()
            up, down = (core, basis.mT) if turn else (basis, core)
            return back(up, down, stack, site)

        place = inner_site(site, inside[0].shape, changes[0].shape)
        return Entered(self.then, Stack(inside, stack.models, stack.present), place, leave)


def coordinates(stack: Stack, site: Site) -> list[Delta] | None:
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


def inner_site(site: Site, shape: tuple[int, ...], full: tuple[int, ...]) -> Site:
    """The place of what matrices of a full shape are in other bases."""
    return replace(site, shape=shape, axis=1, start=0, side=site.side or min(full))


def back(up: Tensor, down: Tensor, stack: Stack, site: Site) -> Delta:
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


def _onto(basis: Tensor, change: Delta) -> Delta:
    """``basis^T change``."""
    if isinstance(change, LowRank):
        return LowRank(basis.mT @ change.up, change.down, (basis.shape[1], change.shape[1]))
    return Dense(basis.mT @ change.value)
