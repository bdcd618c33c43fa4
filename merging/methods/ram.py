"""RAM: add up what one model alone changed, average what several did."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack, sum_in_order, weighted_sum
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import Coefficient, Local
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistic, Statistics

__all__ = ["Ram", "RamPlus"]

_SIZES, _COUNTS = "ram.sizes", "ram.counts"


class Ram(Method):
    """Reinforced agent merging: each entry is the mean over the models that are active there.

    A model is active where |tau_i| > epsilon times the root mean square of its change of the tensor. With `relative`
    off, it is active where |tau_i| > epsilon (1e-5 in the authors' code, which does not separate changes of that size).
    Inactive entries are dropped, and the other models do not dilute a change of one model alone. It is meant for agents
    trained by reinforcement, whose changes are sparse. On adapters the merged change has full rank. Costs two passes
    over each tensor, one with an absolute epsilon.
    """

    name: ClassVar[str] = "ram"
    summary: ClassVar[str] = "mean over the models that changed an entry at all"
    paper: ClassVar[str] = "Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572"
    workspace: ClassVar[int] = 5

    epsilon: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(1e-3, description="size from which a change counts")
    relative: bool = Field(True, description="epsilon is a share of the change's root mean square in the tensor")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(_SIZES, Sum(), _sizes, per="tensor"),) if self.relative else ()

    def _active(self, stack: Stack, statistics: Statistics) -> list[Tensor]:
        """Return each model's change, 0 where it is not active."""
        values, sizes = stack.dense(), [1.0] * len(stack)
        if self.relative:
            *squares, count = statistics[_SIZES].tolist()
            sizes = [(square / max(1.0, count)) ** 0.5 for square in squares]
        return [
            torch.nn.functional.hardshrink(value, self.epsilon * size)
            for value, size in zip(values, sizes, strict=True)
        ]

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        active = self._active(stack, statistics)
        return Dense(sum_in_order(active) / _count_active(active).clamp_(min=1) * self.scale)


class RamPlus(Ram):
    """RAM, with enlarged entries of one model alone, which make up for its loss in the averages.

    The unique entries of model i are multiplied by 1 + r * min(rho_i, alpha). In each tensor, rho_i is the number of
    its active entries that it shares, over the number of its unique active entries. All else is as in `ram`.
    """

    name: ClassVar[str] = "ramplus_tl"
    summary: ClassVar[str] = "ram, with what one model alone changed enlarged"

    r: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(0.1, description="how much unique changes grow")
    alpha: Local[Annotated[float, Field(ge=0, le=1e9)]] = Field(0.2, description="largest overlap that is made up for")

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (*super().required_statistics(), Statistic(_COUNTS, Sum(), self._counts, per="tensor"))

    def _counts(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        """Return masks ``[2 n, *shape]`` of the shared entries of each model, then of its unique entries."""
        active = self._active(stack, statistics)
        several, changed = (_count_active(active) > 1).to(active[0]), [_change_mask(each) for each in active]
        shared = [each * several for each in changed]
        return torch.stack([*shared, *(each - other for each, other in zip(changed, shared, strict=True))])

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        active = self._active(stack, statistics)
        count = _count_active(active)
        alone = torch.eq(count, 1, out=torch.empty_like(count))
        shared, own = statistics[_COUNTS].view(2, -1).tolist()
        gains = [self.r * min(several / max(1.0, one), self.alpha) for several, one in zip(shared, own, strict=True)]
        total = sum_in_order(active) + weighted_sum(active, gains) * alone
        return Dense(total / count.clamp_(min=1) * self.scale)


def _sizes(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    """Return the squares of each change, and 1 for each entry, ``[n + 1, *shape]``."""
    squares = stack.dense().square()
    return torch.cat([squares, torch.ones_like(squares[:1])])


def _change_mask(values: Tensor) -> Tensor:
    """Return 1 where a change is not 0, else 0, in its type."""
    return torch.ne(values, 0, out=torch.empty_like(values))


def _count_active(active: list[Tensor]) -> Tensor:
    """Return the number of models in which each entry is active."""
    return sum_in_order([_change_mask(each) for each in active])
