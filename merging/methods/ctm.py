"""Compress-then-Merge: the changes in shared bases of a small rank, before any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import fix_signs, joint_core, output_basis
from merging.maths.parameters import Local
from merging.methods.families.shared_basis import Coordinates, SharedBasis
from merging.methods.families.whole_matrices import transpose

__all__ = ["Ctm"]


class Ctm(SharedBasis):
    """Merge M_i = U^T tau_i V of r rows and columns in place of tau_i, where U and V hold most of all changes.

    The merge M becomes the adapter U M V^T of rank r, whatever is inside: `ctm+ties` and `ctm+dare+ties` need not be
    cut afterwards. U and V are the r output and input directions that hold most energy of the changes X_i = tau_i *
    (beta + (1 - beta) * mean |tau| / |tau_i|): the leading directions of each side at first, and then, in turns, of
    each side as the other one leaves it (HOOI, a Tucker decomposition). So with `beta = 1` large changes count most,
    and with 0 all count alike. The M_i are of the changes themselves. With r at the sum of the ranks it is `core`.

    Departures from the released code (ZhengbaoHe/compress-then-merge): at most 10 turns, where it allows 1000 and ends
    earlier in practice; the largest entry of each direction is positive. It publishes `ctm+ties` with `beta = 0.25`,
    `density = 0.25`, `scope = tensor` and `scale = 0.75` for adapters of rank 16.

    On adapters the turns go on in the joint spaces of the factors. Matrices of full checkpoints cost two eigenvalue
    problems a turn, in each sweep of the method inside over the model, and r is the shorter side over n unless given.
    Vectors, convolutions and embedding tables in full, and experts, pass unchanged.
    """

    name: ClassVar[str] = "ctm"
    summary: ClassVar[str] = "changes in common bases of a rank, so that the merge has it"
    paper: ClassVar[str] = "Compress then Merge, He et al. 2026, arXiv 2606.03723"

    max_rank: Annotated[int, Field(ge=1)] | None = Field(
        None, description="rank of a merged matrix, by default the largest rank of an adapter"
    )
    beta: Local[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.25, description="1: directions of large changes count more; 0: all changes count alike"
    )
    steps: Local[Annotated[int, Field(ge=0, le=1000)]] = Field(10, description="turns that improve both bases, at most")
    tol: Local[Annotated[float, Field(ge=0, lt=1)]] = Field(
        1e-6, description="a turn that adds less than this share of the energy is the last"
    )

    def merged_rank(self, ranks: Sequence[int]) -> int:
        return min(self.max_rank or max(ranks, default=0), sum(ranks))

    def decompositions(self, models: int) -> int:
        return 2 * (self.steps + 1)

    def change_basis(self, changes: list[Delta], dtype: torch.dtype) -> Coordinates:
        low = [change for change in changes if isinstance(change, LowRank)]
        if len(low) == len(changes):
            up, down, inside = joint_core(low)
            left, right = up, down.mT
            if rank := self.merged_rank([change.rank for change in low]):
                inner = self._bases(inside, rank)
                left, right = fix_signs(up @ inner[0]), fix_signs(down.mT @ inner[1])
            cores: list[Delta] = [
                Dense(((left.mT @ change.up.double()) @ (change.down.double() @ right)).to(dtype)) for change in low
            ]
        else:
            inside = [change.dense().double() for change in changes]
            rank = self.max_rank or max(1, min(inside[0].shape) // len(inside))
            left, right = self._bases(inside, rank)
            cores = [Dense((left.mT @ change @ right).to(dtype)) for change in inside]
        left, right = left.to(dtype), right.to(dtype)
        return cores, lambda core: (left @ core, right.mT)

    def _bases(self, changes: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """Return the bases ``[out, rank]`` and ``[in, rank]``, at most, of matrices ``[out, in]`` float64."""
        norms = [float(change.norm()) for change in changes]
        mean = sum(norms) / len(norms)
        scaled: list[Delta] = [
            Dense(change * (self.beta + (1 - self.beta) * mean / norm if norm else 0.0))
            for change, norm in zip(changes, norms, strict=True)
        ]
        turned = [transpose(change) for change in scaled]
        left, right = output_basis(scaled)[:, :rank], output_basis(turned)[:, :rank]
        total = sum(float(change.dense().square().sum()) for change in scaled)
        held = 0.0
        for _ in range(self.steps):
            left = output_basis([Dense(change.dense() @ right) for change in scaled])[:, :rank]
            right = output_basis([Dense(change.dense() @ left) for change in turned])[:, :rank]
            before, held = held, sum(float((left.mT @ change.dense() @ right).square().sum()) for change in scaled)
            if held - before <= self.tol * total:
                break
        return left, right
