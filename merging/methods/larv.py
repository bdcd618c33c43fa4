"""LARV: each matrix's change made larger or smaller by its depth, its rank, and its conflict with the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd
from merging.maths.parameters import Local
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.families.whole_matrices import as_matrices

__all__ = ["Larv"]

_MOMENTS = "larv.moments"


class Larv(Wrapper):
    """Multiply each change of a matrix by 1 + strength * tanh(gamma * (score - 1)) before the method inside merges.

    score = e^eta * d^rho / (1 + softplus(z)) for each model and matrix, with the base's weights W and the change D:

    - e is the ratio of the effective ranks of W and D. An effective rank is exp(entropy) of the squared singular
      values, as shares of their sum. A change of few directions counts more.
    - d = (l + 1) / L in block l of L. Deep blocks count more.
    - z is the conflict c of D with W, standardized over the model's matrices, where c is the mean of |W D^T - D W^T|
      and |W^T D - D^T W|, over |W| |D|.

    So shallow matrices are merged with half of their size, deep ones with up to one and a half. Unlike `lines` it looks
    at the values. It needs the base also for adapters, and comes before other wrappers of changes in a chain. The
    effective rank of an adapter is so small that nearly all its scores reach the upper end: it is meant for full
    fine-tunes, and on adapters `lines` differs more by depth.

    The formula is of a port: the paper's own code is not public. Departures: the paper scores a layer, here each matrix
    in a block has its own score; of the paper's gates the smooth one is here, and not its tiers, whose values are
    unknown. All else passes unchanged.

    It costs n + 1 eigenvalue problems of a matrix's shorter side, in each sweep of the method inside and in one more.
    """

    name: ClassVar[str] = "larv"
    summary: ClassVar[str] = "scale each change by depth, rank and conflict"
    paper: ClassVar[str] = "LARV, Wang et al. 2026, arXiv 2602.09413"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "shorter"
    workspace: ClassVar[int] = 6

    strength: Local[Annotated[float, Field(ge=0, le=1)]] = Field(0.5, description="largest share by which sizes change")
    gamma: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(3.0, description="steepness around a score of 1")
    eta: Local[Annotated[float, Field(ge=0, le=10)]] = Field(1.0, description="power of the ranks' ratio")
    rho: Local[Annotated[float, Field(ge=0, le=10)]] = Field(0.5, description="power of the depth")

    @property
    def by_depth(self) -> bool:
        return True

    @property
    def needs_base(self) -> bool:
        return True

    def idle(self, site: Site) -> Mapping[str, str]:
        own = ("strength", "gamma", "eta", "rho")
        return {} if _is_scored(site) else dict.fromkeys(own, "larv scores only matrices in blocks")

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if _is_scored(site) else self.then.grain_at(site)

    def decompositions(self, models: int) -> int:
        return models + 1

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(_MOMENTS, Sum(), _moments), *super().required_statistics())

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = as_matrices(stack, site) if _is_scored(site) else None
        if changes is None or stack.base is None:
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        base = _base_matrix(stack.base, site)
        ranks = [_effective_rank(change) for change in (Dense(base), *changes)]
        count, total, squares = statistics[_MOMENTS].view(3, -1)
        mean = total / count.clamp(min=1)
        spread = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        conflicts = _conflicts(base, changes)
        z = torch.where(spread > 1e-12 * mean, (conflicts - mean) / torch.where(spread > 0, spread, 1.0), 0.0)
        depth = ((site.position.layer or 0) + 1) / max(1, site.position.layers)
        scaled: list[Delta] = []
        for delta, rank, each in zip(stack.deltas, ranks[1:], z.tolist(), strict=True):
            if not rank:
                scaled.append(delta)
                continue
            softplus = float(torch.nn.functional.softplus(torch.tensor(each, dtype=torch.float64)))
            score = (ranks[0] / rank) ** self.eta * depth**self.rho / (1 + softplus)
            gate = float(torch.tanh(torch.tensor(self.gamma * (score - 1), dtype=torch.float64)))
            scaled.append(delta.scaled(1 + self.strength * gate))
        return Unwrapped(self.then, Stack(scaled, stack.models, stack.present), site, lambda merged: merged)


def _is_scored(site: Site) -> bool:
    return site.kind == "matrix" and site.position.layer is not None


def _moments(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    """Return how many matrices each model changes, and the sums of their conflicts and of the squares, ``[3 n, 1]``."""
    changes = as_matrices(stack, site) if _is_scored(site) else None
    if changes is None or stack.base is None:
        return torch.zeros(3 * len(stack), 1, dtype=torch.float64)
    conflicts = _conflicts(_base_matrix(stack.base, site), changes)
    return torch.cat([(conflicts > 0).to(conflicts), conflicts, conflicts.square()])[:, None]


def _base_matrix(base: Tensor, site: Site) -> Tensor:
    """Return the base's matrix ``[out, in]``, float64."""
    return (base.mT if site.axis == 0 else base).double()


def _effective_rank(change: Delta) -> float:
    """Return exp(entropy) of the squared singular values as shares; 0 of a zero matrix."""
    if isinstance(change, LowRank):
        squares = factored_svd(change.up, change.down)[1].square()
    else:
        matrix = change.value.double()
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        squares = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0)
    total = squares.sum()
    if not total:
        return 0.0
    shares = squares / total
    return float(torch.special.entr(shares).sum().exp())


def _conflicts(base: Tensor, changes: list[Delta]) -> Tensor:
    """Return the conflict of each change with the base, ``[n]`` float64; 0 of a zero change."""
    return torch.stack([_conflict(base, change) for change in changes])


def _conflict(base: Tensor, change: Delta) -> Tensor:
    """Return the mean of |W D^T - D W^T| and |W^T D - D^T W|, over |W| |D|, by |P - P^T|^2 = 2 |P|^2 - 2 tr(P P)."""
    if isinstance(change, LowRank):
        up, down = change.up.double(), change.down.double()
        left, right = base @ down.mT, base.mT @ up
        inner = up.mT @ left
        squares = [((left.mT @ left) * (up.mT @ up)).sum(), ((right.mT @ right) * (down @ down.mT)).sum()]
        traces = [(inner * inner.mT).sum()] * 2
        size = ((up.mT @ up) * (down @ down.mT)).sum()
    else:
        matrix = change.value.double()
        products = [base @ matrix.mT, base.mT @ matrix]
        squares = [product.square().sum() for product in products]
        traces = [(product * product.mT).sum() for product in products]
        size = matrix.square().sum()
    norms = [(2 * square - 2 * trace).clamp(min=0).sqrt() for square, trace in zip(squares, traces, strict=True)]
    sizes = base.norm() * size.clamp(min=0).sqrt()
    return torch.where(sizes > 0, (norms[0] + norms[1]) / (2 * torch.where(sizes > 0, sizes, 1.0)), 0.0)
