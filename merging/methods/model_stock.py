"""Model Stock: a step from the base to the mean of the models whose length follows from their changes' angles."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack, weighted_sum
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistic, Statistics
from merging.methods.families.spherical import GRAM, cosines, gram

__all__ = ["ModelStock", "share_of_mean"]


class ModelStock(Method):
    """theta_0 + t * mean_i tau_i with t = n c / (1 + (n - 1) c), c the mean cosine between the models' changes.

    It works on each tensor, or on each row as in memory (`filter_wise`). Where changes are at right angles, t is 0 and
    the base remains; where they are parallel, t is 1 and the result is the mean. It is meant for fine-tunes of one base
    on one task that differ by seed, whose changes share a direction. Task vectors of different tasks hardly do, and
    nearly nothing of them is merged. A model that changed nothing is at a right angle to all. On adapters it is exact,
    unless row by row. Costs two passes over each tensor.
    """

    name: ClassVar[str] = "model_stock"
    summary: ClassVar[str] = "from the base to the mean, as far as changes agree"
    paper: ClassVar[str] = "Model Stock, Jang et al. 2024, arXiv 2403.19522"
    models: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool = Field(False, description="take angles of each row instead of the whole tensor")

    def grain_at(self, site: Site) -> Grain:
        return "row" if self.filter_wise else "element"

    @property
    def factored(self) -> bool:
        return not self.filter_wise

    def required_statistics(self) -> tuple[Statistic, ...]:
        return () if self.filter_wise else (GRAM,)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        n = len(stack)
        if not self.filter_wise:
            return stack.weighted_sum([float(share_of_mean(gram(statistics))) / n] * n)
        rows = stack.dense().reshape(n, -1, site.row)
        products = [[(one * other).sum(-1, dtype=torch.float64) for other in rows] for one in rows]
        share = share_of_mean(torch.stack([torch.stack(each) for each in products]))
        merged = weighted_sum(rows, [1 / n] * n) * share[:, None].to(rows)
        return Dense(merged.reshape(stack.dense().shape[1:]))


def share_of_mean(grams: Tensor) -> Tensor:
    """Return t, from the inner products ``[n, n, ...]`` of the changes; 0 where its denominator vanishes."""
    n = len(grams)
    _, angles = cosines(grams)
    upper = torch.triu_indices(n, n, 1)
    mean = angles[upper[0], upper[1]].mean(0)
    below = 1 + (n - 1) * mean
    vanishes = below.abs() < 1e-6
    return torch.where(vanishes, 0.0, n * mean / torch.where(vanishes, 1.0, below))
