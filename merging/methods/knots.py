"""KnOTS: the models' changes in one basis of outputs, before any method."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.linalg import output_basis
from merging.methods.families.shared_basis import InBasis, Turned, turned

__all__ = ["Knots"]


class Knots(InBasis):
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

    align: Literal["outputs", "inputs"] = Field("outputs", description="which side the common basis is of")

    def turn(self, changes: list[Delta], dtype: torch.dtype) -> Turned:
        over = self.align == "inputs"
        sides = [turned(change) for change in changes] if over else changes
        basis = output_basis(sides).to(dtype)
        inside = [_onto(basis, change) for change in sides]
        if over:
            return [turned(change) for change in inside], lambda core: (core, basis.mT)
        return inside, lambda core: (basis, core)


def _onto(basis: Tensor, change: Delta) -> Delta:
    """``basis^T change``."""
    if isinstance(change, LowRank):
        return LowRank(basis.mT @ change.up, change.down, (basis.shape[1], change.shape[1]))
    return Dense(basis.mT @ change.value)
