"""OPCM: models are merged one after the other, each without the part that would disturb those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, LowRank, Stack
from merging.maths.fast_svd import fast_svd, suits_float32
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import decompose, joint_core, squared_norm
from merging.maths.parameters import Coefficient, Local
from merging.maths.products import multiply, row_products
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import safe_ratio
from merging.methods.contract.method import Grain, Method, ResultStatistic, Statistics
from merging.methods.contract.update_rule import History, UpdateRule
from merging.methods.task_arithmetic import scaled_state

__all__ = ["Opcm", "project", "sum_projected"]

SvdWay = Literal["gram", "thin", "exact", "fast"]
"""A way to decompose full matrices; ``exact`` is ``gram``."""

_SQUARES = "opcm.squares"
_FACTOR = "opcm: what the sum is multiplied by"


class Opcm(Method):
    """Orthogonal-projection continual merging, in the order of the models.

    S_1 = tau_1, S_t = S_{t-1} + P(tau_t; S_{t-1}), and the result is S_T * mean_t |tau_t| / |S_T|, with norms over the
    whole model. The result is as large as one task vector on average, and there is no coefficient to tune. The sum is
    the paper's recursion with its running factors collected into one. In the basis of the singular vectors of S, P
    removes from tau the diagonal and

    - `block` (the released code of tanganke/opcm): the square of the leading directions, whose singular values add up
      to the share `alpha` of the sum of all. This keeps nine tenths of tau, and gave the published tables.
    - `two_sided` (the paper): all rows and all columns of these directions. This keeps about half of tau.

    Either way <P(tau), S> = 0. Linear weights are projected; biases, norms, embeddings and convolutions are added up.
    Departures from the code: null directions of S have an arbitrary basis, so nothing is removed from tau there, and
    all of tau is kept where S is 0. Parameters outside leaf modules are merged like any other.

    It is meant for models that arrive one by one. The first model is never projected, so order matters a little. On
    adapters the merge works on matrices of the sum of ranks; the result is exact, and of that rank. On full checkpoints
    each matrix is decomposed once per model: by eigenvalues of its shorter side's Gram matrix (`svd = gram`) unless it
    is too ill conditioned, or by SVD (`thin`). On two cores this takes a quarter of an hour for each billion parameters
    and further model. `svd = fast` works in float32, in six tenths of the time, most of it
    for eigenvectors: the diagonal needs all of them, so that leading directions alone would not do. Directions of small
    singular values are less exact there, so that the result is within a few thousandths.
    """

    name: ClassVar[str] = "opcm"
    summary: ClassVar[str] = "one after the other, projected off the merge so far"
    paper: ClassVar[str] = "Merging Models on the Fly, Tang et al. 2025, arXiv 2501.09522"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "shorter"
    metric_meanings: ClassVar[Mapping[str, str]] = {
        _FACTOR: "so that the merge is as large as the models' changes are on average"
    }

    alpha: Local[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.5, description="share of the merge's singular values whose directions are kept free"
    )
    mode: Literal["block", "two_sided"] = Field("block", description="what is projected away there")
    svd: SvdWay = Field(
        "gram", description="how full matrices are decomposed; exact is gram, fast is float32 where checks hold"
    )

    def idle(self, site: Site) -> Mapping[str, str]:
        matrices = self.grain_at(site) == "matrix"
        return {} if matrices else dict.fromkeys(("alpha", "mode", "svd"), "opcm decomposes only matrices")

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind in ("matrix", "experts") else "element"

    @property
    def factored(self) -> bool:
        return True

    def decompositions(self, models: int) -> int:
        return max(1, models - 1)  # the first model is taken as it is

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        return (ResultStatistic(_SQUARES, Sum(), _squares, grain="matrix"),) if models > 1 else ()

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        if models == 1:
            return 1.0
        *each, merged = (sqrt(square) for square in statistics[_SQUARES].tolist())
        return safe_ratio(sum(each) / models, merged)

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        return {_FACTOR: float(self.factor(Site("", ()), statistics, models))}

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        if site.kind not in ("matrix", "experts"):
            return stack.weighted_sum([1.0] * len(stack))
        if stack.low_rank and site.kind == "matrix":
            return self._merge_factors([delta for delta in stack.deltas if isinstance(delta, LowRank)])
        values = stack.dense()
        null = _null(values.dtype, values.shape[-2:])
        if values.dim() == 3:
            merged = sum_projected(list(values), self.alpha, self.mode, null, self.svd)
        else:  # experts side by side
            experts = [
                sum_projected(list(each), self.alpha, self.mode, null, self.svd) for each in values.transpose(0, 1)
            ]
            merged = torch.stack(experts)
        return Dense(merged.to(values.dtype))

    def update_rule(self) -> UpdateRule:
        return scaled_state("sum", self, _mean_size)

    def _merge_factors(self, deltas: Sequence[LowRank]) -> LowRank:
        """Merge in the joint column and row space of all factors, where every matrix is a small core."""
        first = deltas[0]
        up, down, cores = joint_core(deltas)
        null = _null(first.up.dtype, (len(up), down.shape[1]))
        merged = sum_projected(cores, self.alpha, self.mode, null, "thin")
        return LowRank((up @ merged).to(first.up.dtype), down.to(first.down.dtype), first.shape, first.transposed)


def _mean_size(history: History) -> float:
    """Return the multiple of the sum whose norm is the mean norm of the models' changes."""
    return safe_ratio(sum(history.norms) / history.models, history.state_norm) if history.models else 1.0


def _squares(merged: Delta, stack: Stack, site: Site) -> Tensor:
    """Return the squared norm of each change and of their merge, ``[n + 1, 1]``."""
    return torch.stack([squared_norm(delta) for delta in (*stack.deltas, merged)])[:, None]


def _null(dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Return the share of the largest singular value below which a direction is only rounding."""
    return max(shape) * torch.finfo(dtype).eps


def sum_projected(deltas: Sequence[Tensor], alpha: float, mode: str, null: float, svd: SvdWay = "gram") -> Tensor:
    """Return S_T of matrices ``[m, k]`` in order, ``[m, k]`` float64."""
    total = deltas[0].double()
    way: SvdWay = "gram" if svd == "fast" and not suits_float32(deltas[0]) else svd
    for delta in deltas[1:]:
        total = total + project(delta.double(), total, alpha, mode=mode, null=null, svd=way)
    return total


def project(
    delta: Tensor,
    previous: Tensor,
    alpha: float,
    *,
    mode: str = "block",
    null: float = 1e-12,
    svd: SvdWay = "gram",
) -> Tensor:
    """Return P(delta; previous): ``delta [m, k]`` without the part that disturbs ``previous [m, k]``, both float64.

    Directions whose singular values are at most the share ``null`` of the largest are null directions. With ``fast``
    the result is float32 where the decomposition in float32 passes its checks.
    """
    if not previous.any():
        return delta
    found = fast_svd(previous.float(), least=null) if svd == "fast" else None
    u, s, vh = decompose(previous, "thin" if svd == "thin" else "gram") if found is None else found
    delta = delta.to(s)
    rank = int((s > null * s[:1]).sum())
    if not rank:
        return delta
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    shares = s.cumsum(0) / s.sum()
    if mode == "block":
        split = rank if alpha >= 1 else int((shares <= alpha).sum())
        images = multiply(u.mT, delta)
        diagonal = (images * vh).sum(1)
        square = row_products(images[:split], vh[:split])  # without its diagonal, which is removed with all of it
        square.diagonal().zero_()
        removed = vh * diagonal[:, None]
        removed[:split] += multiply(square, vh[:split])
        return delta - multiply(u, removed)
    split = rank if alpha >= 1 else min(rank, int((shares < alpha).sum()) + 1)
    left, right = u[:, :split], vh[:split]
    rest = delta - multiply(left, multiply(left.mT, delta))
    rest = rest - multiply(row_products(rest, right), right)
    u, vh = u[:, split:], vh[split:]
    return rest - multiply(u * (multiply(u.mT, rest) * vh).sum(1), vh)
