"""Core space: the models' changes in one basis of outputs and one of inputs, before any method."""

from __future__ import annotations

from typing import ClassVar

import torch

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.linalg import output_basis
from merging.methods.families.shared_basis import InBasis, Turned, turned

__all__ = ["Core"]


class Core(InBasis):
    """M_i = U^T tau_i V is merged for tau_i, where U and V span the outputs and the inputs of all changes.

    Nothing is lost, and on adapters the matrices that are merged have as many rows and columns as the sum of the ranks:
    whatever the method inside costs, here it is a hundred times cheaper, and its merge M comes back as the adapter
    U M V^T. Methods that compare entries (`ties`) depend on the basis; U and V are the singular vectors of the changes
    side by side and on top of each other, their largest entries positive. (The paper takes those of the factors side
    by side, which depend on how a change was factored.) Methods that take matrices apart (`tsv`, `iso_c`) give what
    they give without it. Matrices of full checkpoints are merely turned, at the cost of two eigenvalue problems,
    anew in each sweep of the method inside over the model; vectors, convolutions and embedding tables in full pass.
    """

    name: ClassVar[str] = "core"
    summary: ClassVar[str] = "changes in common bases of outputs and of inputs"
    paper: ClassVar[str] = "Core Space, Panariello et al. 2025, arXiv 2509.17786"

    def turn(self, changes: list[Delta], dtype: torch.dtype) -> Turned:
        up = output_basis(changes).to(dtype)
        down = output_basis([turned(change) for change in changes]).mT.to(dtype)
        cores: list[Delta] = []
        for change in changes:
            if isinstance(change, LowRank):
                cores.append(Dense((up.mT @ change.up) @ (change.down @ down.mT)))
            else:
                cores.append(Dense(up.mT @ change.value @ down.mT))
        return cores, lambda core: (up @ core, down)
