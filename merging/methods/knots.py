"""KnOTS: the models' changes in a shared basis of outputs, before any method."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import output_basis
from merging.methods.families.shared_basis import Coordinates, SharedBasis
from merging.methods.families.whole_matrices import transpose

__all__ = ["Knots"]


class Knots(SharedBasis):
    """Knowledge orientation through SVD: [tau_1 .. tau_n] = U S [V_1^T .. V_n^T], and merge S V_i^T for tau_i.

    Adapters of different tasks hardly share a basis, so methods that compare entries (`ties`, `dare`, `magmax`) compare
    unrelated numbers. In the basis U of all their outputs the entries correspond: `knots+ties`. The merge M of the
    S V_i^T becomes U M. Singular values below 1e-6 of the largest are left out, and the largest entry of each vector of
    U is positive. `align = inputs` puts the changes on top of each other instead. Around a sum it changes nothing.

    On adapters it is exact and low-rank, whatever is inside: the rank is at most the sum of the ranks, and thresholds
    of a method inside are taken over the coordinates. Matrices of full checkpoints cost an eigenvalue problem of their
    outputs in each sweep of the method inside over the model (`--scope tensor` needs one sweep). Vectors, convolutions
    and embedding tables in full pass unchanged.
    """

    name: ClassVar[str] = "knots"
    summary: ClassVar[str] = "changes in one common basis of outputs"
    paper: ClassVar[str] = "KnOTS, Stoica et al. 2025, arXiv 2410.19735"

    align: Literal["outputs", "inputs"] = Field("outputs", description="which side the common basis is of")

    def change_basis(self, changes: list[Delta], dtype: torch.dtype) -> Coordinates:
        over = self.align == "inputs"
        sides = [transpose(change) for change in changes] if over else changes
        basis = output_basis(sides).to(dtype)
        inside = [_onto(basis, change) for change in sides]
        if over:
            return [transpose(change) for change in inside], lambda core: (core, basis.mT)
        return inside, lambda core: (basis, core)


def _onto(basis: Tensor, change: Delta) -> Delta:
    """``basis^T change``."""
    if isinstance(change, LowRank):
        return LowRank(basis.mT @ change.up, change.down, (basis.shape[1], change.shape[1]))
    return Dense(basis.mT @ change.value)
