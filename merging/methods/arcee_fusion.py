"""Arcee Fusion: the second model's weights where they matter most, and the first model's elsewhere."""

from __future__ import annotations

from typing import ClassVar, Literal

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.radix_selection import OrderStatistics
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistic, Statistics

__all__ = ["ArceeFusion", "importance"]

_QUARTILES = "arcee_fusion.quartiles"


class ArceeFusion(Method):
    """theta = b where importance >= median + 1.5 (q3 - q1), else a; a is the first model (the base), b the second.

    An entry's importance is |b - a| times KL(softmax(b) || softmax(a)) of its row. Rows are as in memory, and a vector
    is one row. The quartiles of the tensor's importances are exact, and entries equal to the threshold are taken from
    b. About one entry in twenty moves: the outliers among the differences. It merges weights, so adapters need the
    base. Costs four passes over each tensor.
    """

    name: ClassVar[str] = "arcee_fusion"
    summary: ClassVar[str] = "the second model where it differs most from the first"
    paper: ClassVar[str] = "Arcee Fusion, Arcee AI 2024, in mergekit"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    workspace: ClassVar[int] = 12

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "weights"

    def grain_at(self, site: Site) -> Grain:
        return "row"

    def required_statistics(self) -> tuple[Statistic, ...]:
        ranks = OrderStatistics(tuple(map(Rank.quantile, (0.25, 0.5, 0.75))))
        return (Statistic(_QUARTILES, ranks, _importances, per="tensor"),)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        first, second = stack.dense()
        low, median, high = statistics[_QUARTILES][0].tolist()
        moved = _importances(stack, site, statistics)[0] >= median + 1.5 * (high - low)
        return Dense(torch.where(moved.view(first.shape), second, first))


def _importances(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    first, second = stack.dense().reshape(2, -1, site.row)
    return importance(first, second)[None]


def importance(first: Tensor, second: Tensor) -> Tensor:
    """Return the importances ``[rows, columns]`` of two models' rows.

    The divergence is computed in float64, as it is a small difference of sums.
    """
    a, b = first.double().log_softmax(-1), second.double().log_softmax(-1)
    divergence = (b.exp() * (b - a)).sum(-1, keepdim=True).clamp(min=0)
    return (second - first).abs() * divergence.to(first)
