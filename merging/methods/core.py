"""Core space: the models' changes in a shared basis of outputs and of inputs, before any method."""

from __future__ import annotations

from typing import ClassVar

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import torch
from merging.maths.linalg import output_basis
from merging.methods.families.shared_basis import Coordinates, SharedBasis
from merging.methods.families.whole_matrices import transpose

__all__ = ["Core"]


class Core(SharedBasis):
    """Merge M_i = U^T tau_i V in place of tau_i, where U and V span the outputs and the inputs of all changes.

    Nothing is lost. On adapters the matrices M_i have as many rows and columns as the sum of the ranks, so that any
    method inside is a hundred times cheaper; its merge M becomes the adapter U M V^T. Methods that compare entries
    (`ties`) depend on the basis. U and V are the singular vectors of the changes side by side and on top of each other,
    with their largest entries positive. (The paper takes the singular vectors of the factors side by side, which depend
    on how a change was factored.) Methods that decompose matrices (`tsv`, `iso_c`) give the result that they give
    without it. Matrices of full checkpoints are only rotated, at the cost of two eigenvalue problems in each
    sweep of the method inside over the model. Vectors, convolutions and embedding tables in full pass unchanged.
    """

    name: ClassVar[str] = "core"
    summary: ClassVar[str] = "changes in common bases of outputs and of inputs"
    paper: ClassVar[str] = "Core Space, Panariello et al. 2025, arXiv 2509.17786"

    def change_basis(self, changes: list[Delta], dtype: torch.dtype) -> Coordinates:
        up = output_basis(changes).to(dtype)
        down = output_basis([transpose(change) for change in changes]).mT.to(dtype)
        cores: list[Delta] = []
        for change in changes:
            if isinstance(change, LowRank):
                cores.append(Dense((up.mT @ change.up) @ (change.down @ down.mT)))
            else:
                cores.append(Dense(up.mT @ change.value @ down.mT))
        return cores, lambda core: (up @ core, down)
