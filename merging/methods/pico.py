"""Pico: shrink the output directions that the changes share, before any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import number
from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd, leading_svd, squared_norm
from merging.maths.parameters import Coefficient, Local
from merging.maths.site import Site
from merging.maths.sums import safe_ratio
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped
from merging.methods.families.spectral import as_stored
from merging.methods.families.whole_matrices import WholeMatrices, as_matrices

__all__ = ["Pico"]


class Pico(WholeMatrices):
    """Shrink output directions by the share of energy that all changes together have there, and restore the size.

    With tau_i = B_i A_i and [B_1 .. B_n] = U S V^T, direction j has the share s_j = S_j^2 / sum S^2, and every change
    is multiplied by 1 / (1 + (n - 1) s_j) along u_j. The method inside merges them. Each matrix of the result is
    rescaled to `norm` times the mean norm of the changes, so that the scale of the method inside does not matter.
    Models that do not change the tensor do not count.

    The paper takes the factors as they were trained. Here they are balanced first (the product's singular values split
    evenly), so that the result depends on the changes alone, and full matrices are merged by the same rule. Departure:
    a port rescales to the norms of the B_i; here, as the paper says, the norms are of the changes.

    On adapters it is exact and low-rank, if the method inside is. On full checkpoints it takes n + 1 eigenvalue
    problems of a matrix's shorter side. Vectors, convolutions and embedding tables in full, and experts, pass
    unchanged, and are not rescaled.
    """

    name: ClassVar[str] = "pico"
    summary: ClassVar[str] = "shared output directions made smaller"
    paper: ClassVar[str] = "Crowded in B-Space, Tang and Yang 2026, arXiv 2604.16826"

    norm: Local[Coefficient] = Field(1.0, description="norm of a merged matrix as a multiple of the changes' mean norm")

    def check(self, models: int) -> None:
        super().check(models)
        last = self.links()[-1]
        if "scale" in last.model_fields_set:
            raise OptionError(
                f"{last.name}.scale must be left out under pico, which sets the size of each matrix itself: choose "
                f"pico.norm"
            )

    def decompositions(self, models: int) -> int:
        return models + 1

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = as_matrices(stack, site)
        norms = [] if changes is None else [number(squared_norm(change).sqrt()) for change in changes]
        if changes is None or not any(norms):
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        moving = [change for change, norm in zip(changes, norms, strict=True) if norm]
        u, shrinks = _shared_directions(moving)
        shrunk: list[Delta] = []
        for delta, change in zip(stack.deltas, changes, strict=True):
            if isinstance(delta, LowRank):
                up = _shrink(delta.up, u, shrinks)
                shrunk.append(LowRank(up, delta.down, delta.shape, delta.transposed))
            else:
                shrunk.append(Dense(as_stored(_shrink(change.dense(), u, shrinks), site)))
        wanted = sum(norms) / len(moving)
        return Unwrapped(
            self.then,
            Stack(shrunk, stack.models, stack.present),
            site,
            lambda merged: merged.scaled(self.norm * safe_ratio(wanted, number(squared_norm(merged).sqrt()))),
        )


def _shared_directions(changes: Sequence[Delta]) -> tuple[Tensor, Tensor]:
    """Return the output directions ``[out, k]`` of all changes together, and each one's factor less 1, float64."""
    sides = []
    for change in changes:
        if isinstance(change, LowRank):
            u, values, _ = factored_svd(change.up, change.down)
        else:
            u, values, _ = leading_svd(change.value)
        sides.append(u * values.sqrt())
    u, values, _ = leading_svd(torch.cat(sides, 1))
    energy = values.square()
    return u, 1 / (1 + (len(changes) - 1) * energy / energy.sum()) - 1


def _shrink(matrix: Tensor, u: Tensor, shrinks: Tensor) -> Tensor:
    """Return ``matrix [out, ...]`` with its part along each direction multiplied by 1 + its shrink."""
    shrunk: Tensor = matrix.double() + (u * shrinks) @ (u.mT @ matrix.double())
    return shrunk.to(matrix.dtype)
