"""Core space: the models' changes in one basis of outputs and one of inputs, before any method."""

from __future__ import annotations

from typing import ClassVar

from merging.delta import Delta, Dense, LowRank, Stack
from merging.linalg import output_basis
from merging.method import Grain, Seen
from merging.methods.knots import back, coordinates, inner_site, turned
from merging.site import Site
from merging.wrapper import Entered, Wrapper

__all__ = ["Core"]


class Core(Wrapper):
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
    takes_apart: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    long_side: ClassVar[bool] = True
    workspace: ClassVar[int] = 6

    @property
    def factored(self) -> bool:
        return True

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind == "matrix" else self.then.grain_at(site)

    def enter(self, stack: Stack, site: Site, seen: Seen) -> Entered:
        changes = coordinates(stack, site)
        if changes is None:
            return Entered(self.then, stack, site, lambda merged: merged)
        up = output_basis(changes).to(stack.dtype)
        down = output_basis([turned(change) for change in changes]).mT.to(stack.dtype)
        cores: list[Delta] = []
        for change in changes:
            if isinstance(change, LowRank):
                cores.append(Dense((up.mT @ change.up) @ (change.down @ down.mT)))
            else:
                cores.append(Dense(up.mT @ change.value @ down.mT))

        place = inner_site(site, cores[0].shape, changes[0].shape)
        inside = Stack(cores, stack.models, stack.present)
        return Entered(self.then, inside, place, lambda merged: back(up @ merged.dense(), down, stack, site))
