"""SCE: select entries where the models differ, calculate weights of the models, erase entries of minority sign."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack, weighted_sum
from merging.maths.kernels.combine_steps import square_selected, write_variances
from merging.maths.kernels.steps import merge_agreeing
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.parameters import Coefficient, Local, varies
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import safe_ratio
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.ties import agreeing_mean, elect

__all__ = ["Sce", "shares_of", "variance"]

_CUT, _SQUARES = "sce.cut", "sce.squares"


class Sce(Method):
    """tau = sum_i eta_i e_i tau_i / sum_i eta_i e_i, for each tensor.

    1. Select: the share `density` of largest variance, among the entries whose variance across the models is not 0, and
       all entries equal to the threshold. A density of 1 selects all entries.
    2. Calculate: eta_i, the sum of squares of model i's selected entries, as a share of the sums of all models (equal
       shares if all are 0).
    3. Erase: e_i is 1 where tau_i has the sign of sum_j tau_j (0 counts as +), and 0 elsewhere.

    The selection decides only the shares, and every entry is merged (`select = weights`, the authors' code). Or entries
    that were not selected stay as in the base (`deltas`, as in mergekit): another method, which merges a tenth. There
    is no number to tune. The model that moved farthest counts most, by the square, so that a model that was
    overtrained, or scaled, takes over. On adapters the merged change has full rank. Costs a sample and two sweeps
    over each tensor before the merge, one sweep with a density of 1.
    """

    name: ClassVar[str] = "sce"
    summary: ClassVar[str] = "mean of what agrees in sign, weighted by squared size"
    paper: ClassVar[str] = "FuseChat, Wan et al. 2024, arXiv 2408.07990"
    workspace: ClassVar[int] = 7

    density: Local[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.1, description="share of the entries that is selected"
    )
    select: Literal["weights", "deltas"] = Field("weights", description="what the selection decides")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    def required_statistics(self) -> tuple[Statistic, ...]:
        squares = Statistic(_SQUARES, Sum(), self._squares, per="tensor")
        if varies(self.density) or self.density >= 1:
            return (squares,)
        cut = OrderStatistics((Rank.largest(self.density),), magnitudes=True, positive=True)
        return Statistic(_CUT, cut, _variances, per="tensor"), squares

    def _select(self, stack: Stack, statistics: Statistics) -> Tensor:
        """Return the changes ``[n, *shape]``, 0 where an entry is not selected."""
        values = stack.dense()
        if self.density >= 1:
            return values
        chosen = _variance_of(stack)
        cut = float(statistics[_CUT].sum())  # NaN where no entry varies
        return values * torch.ge(chosen, cut, out=chosen)

    def _squares(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        if self.density < 1:
            squares = square_selected(stack, _variance_of(stack), float(statistics[_CUT].sum()))
            if squares is not None:
                return squares
        return self._select(stack, statistics).square()

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        if self.select == "deltas":
            stack = Stack.of(self._select(stack, statistics), stack.models, stack.present)
        shares = shares_of(statistics[_SQUARES])
        ones = [1.0] * len(stack)
        merged = merge_agreeing(stack, thresholds=[None] * len(stack), votes=ones, weights=shares, scale=self.scale)
        if merged is not None:
            return Dense(merged)
        values = stack.dense()
        signs = elect(list(values), ones)
        signs.add_(torch.eq(signs, 0, out=torch.empty_like(signs)))
        return Dense(agreeing_mean(list(values), signs, shares, normalize=True) * self.scale)


def variance(values: Tensor) -> Tensor:
    """Return n times the variance of each entry across the models, ``[*shape]``; exactly 0 where they are equal."""
    n = len(values)
    shifted = [value - values[0] for value in values[1:]]  # so that equal values have a mean without rounding
    if not shifted:
        return torch.zeros_like(values[0])
    mean = weighted_sum(shifted, [1 / n] * (n - 1))
    total = mean.square()
    for each in shifted:
        total.addcmul_(each.sub_(mean), each)
    return total


def _variances(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    """Return the variances, ``[1, *shape]``; only the positive ones are ranked."""
    return _variance_of(stack)[None]


def _variance_of(stack: Stack) -> Tensor:
    """Return :func:`variance` of the changes of a stack, by a kernel where it can."""
    found = write_variances(stack)
    return variance(stack.dense()) if found is None else found


def shares_of(squares: Tensor) -> list[float]:
    """Return the share of each model: its sum of squares over the sum of all, equal shares if all are 0."""
    total = float(squares.sum())
    return [safe_ratio(float(each), total) if total else 1 / len(squares) for each in squares]
