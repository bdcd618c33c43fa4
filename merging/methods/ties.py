"""TIES: trim small changes, elect a sign for each entry, and average the changes that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import number, spread
from merging.maths.delta import Delta, Dense, Stack, sum_in_order, weighted_sum
from merging.maths.kernels.steps import count_elected, merge_agreeing
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.parameters import Coefficient, Local, PerModel, varies
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistic, Statistics, stored_changes
from merging.methods.contract.update_rule import UpdateRule
from merging.methods.families.l1_norms import l1_ratios, l1_statistic

__all__ = ["Ties", "agreeing_mean", "elect", "trim"]

_THRESHOLDS, _NORMS, _MAJORITY = "ties.thresholds", "ties.norms", "ties.majority"


class Ties(Method):
    """Trim, elect sign, disjoint merge: remove interference between task vectors before they are averaged.

    1. Trim: keep the share `density` of each model's change with the largest magnitudes, and set the rest to 0. Entries
       equal to the threshold are kept (bfloat16 checkpoints have many exact ties, and any choice would be arbitrary).
       With `keep_norm` the kept entries are then multiplied so that each tensor keeps its L1 norm.
    2. Elect: take the sign of the sum of the trimmed changes, entry by entry. Where the sum is 0, take the sign that
       was elected most often over all entries (`zero = majority`, as in the paper's code), or + (`plus`).
    3. Merge: take the weighted mean of the changes with the elected sign; with `normalize` off, their weighted sum.

    A negative weight reverses a model's change before the vote. Magnitudes of weights count in the mean and, with `vote
    = weighted`, in the vote. Thresholds are taken over the whole model, as in the paper, or over each tensor (`scope =
    tensor`). It suits two to about ten models whose plain sum interferes. The result is a mean, so expect a scale of
    about 1. On adapters the merged change has full rank. Costs a sample and two sweeps over the inputs before the merge
    (a sample and one sweep with `zero = plus`, nothing with a density of 1 and `plus`), each in constant memory;
    results are exact.
    """

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "keep large changes, and the ones that agree in sign"
    paper: ClassVar[str] = "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708"
    workspace: ClassVar[int] = 7

    density: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.2, description="share of each model's change that is kept, the largest magnitudes; one for all, or one each"
    )
    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each; may be negative")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")
    scope: Literal["model", "tensor"] = Field("model", description="what `density` is a share of")
    vote: Literal["plain", "weighted"] = Field("plain", description="whether weights count in the election")
    zero: Literal["majority", "plus"] = Field("majority", description="the sign where the changes cancel out")
    keep_norm: Local[bool] = Field(False, description="multiply what is kept so that each tensor keeps its L1 norm")
    normalize: Local[bool] = Field(True, description="average the changes that agree, instead of adding them up")

    def check(self, models: int) -> None:
        super().check(models)
        if self.scope == "model" and varies(self.density):
            raise OptionError(
                "ties.density is a share of the whole model, so it cannot differ from place to place: use "
                "scope = tensor, or one density"
            )

    def idle(self, site: Site) -> Mapping[str, str]:
        trims = varies(self.density) or bool(self._densities())
        idle = {} if trims else {"keep_norm": "a density of 1 trims nothing"}
        return idle if trims or self.zero == "majority" else {**idle, "scope": "a density of 1 trims nothing"}

    def required_statistics(self) -> tuple[Statistic, ...]:
        required_statistics = []
        if not varies(self.density) and self._densities():
            ranks = OrderStatistics(tuple(map(Rank.largest, self._densities())), magnitudes=True)
            required_statistics.append(Statistic(_THRESHOLDS, ranks, stored_changes, per=self.scope))
            if self.keep_norm:
                required_statistics.append(
                    l1_statistic(
                        _NORMS, lambda stack, site, statistics: torch.stack(self._keep_largest(stack, statistics))
                    )
                )
        if self.zero == "majority":
            required_statistics.append(Statistic(_MAJORITY, Sum(), self._elect, per=self.scope, skips_zeros=True))
        return tuple(required_statistics)

    def _densities(self) -> list[float]:
        """Return the densities that need thresholds: all but 0 and 1."""
        return sorted({density for density in spread(self.density, 1) if 0 < density < 1})

    def _trim(self, stack: Stack, statistics: Statistics) -> list[Tensor]:
        """Return each model's change without its small entries, rescaled if asked."""
        trimmed = self._keep_largest(stack, statistics)
        if not self.keep_norm or not self._densities():
            return trimmed
        return [value * ratio for value, ratio in zip(trimmed, l1_ratios(statistics, _NORMS), strict=True)]

    def _keep_largest(self, stack: Stack, statistics: Statistics) -> list[Tensor]:
        values = list(stack.dense())
        kept = []
        for model, (value, density) in enumerate(zip(values, spread(self.density, len(values)), strict=True)):
            if 0 < density < 1:
                value = trim(value, float(statistics[_THRESHOLDS][model, self._densities().index(density)]))
            kept.append(value if density > 0 else torch.zeros_like(value))
        return kept

    def _thresholds(self, models: int, statistics: Statistics) -> list[float | None] | None:
        """Return each model's threshold, None for one that is not trimmed; None where trimming is more than that."""
        densities = spread(self.density, models)
        if 0 in densities or (self.keep_norm and self._densities()):
            return None
        places = [self._densities().index(each) if each < 1 else None for each in densities]
        return [None if k is None else float(statistics[_THRESHOLDS][i, k]) for i, k in enumerate(places)]

    def _votes(self, models: int) -> list[float]:
        weights = [number(weight) for weight in self.coefficients(models)]
        return weights if self.vote == "weighted" else [(weight > 0) - (weight < 0) for weight in weights]

    def _elect(self, stack: Stack, site: Site, statistics: Statistics) -> Tensor:
        thresholds = self._thresholds(len(stack), statistics)
        counted = None if thresholds is None else count_elected(stack, thresholds, self._votes(len(stack)))
        return counted if counted is not None else elect(self._trim(stack, statistics), self._votes(len(stack)))[None]

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        otherwise = -1.0 if self.zero == "majority" and float(statistics[_MAJORITY]) < 0 else 1.0
        thresholds, weights = self._thresholds(len(stack), statistics), self.coefficients(len(stack))
        if thresholds is not None:
            merged = merge_agreeing(
                stack,
                thresholds=thresholds,
                votes=self._votes(len(stack)),
                weights=weights,
                otherwise=otherwise,
                scale=self.scale,
                normalize=self.normalize,
            )
            if merged is not None:
                return Dense(merged)
        trimmed = self._trim(stack, statistics)
        signs = elect(trimmed, self._votes(len(trimmed)))
        signs.add_(_ones(torch.eq, signs), alpha=otherwise)
        return Dense(agreeing_mean(trimmed, signs, weights, self.normalize) * self.scale)

    def update_rule(self) -> UpdateRule:
        if self.scope != "model" or isinstance(self.density, tuple) or not self.density:
            raise OptionError("ties in a store has one density above 0 for all models, with scope = model")
        if self.keep_norm:
            raise OptionError("ties in a store cannot keep the norm of what it trims: leave keep_norm out")
        density, scale = self.density, number(self.scale)
        parts = {
            "positive": Tally(density=density, sign=1, counts=False),
            "negative": Tally(density=density, sign=-1, counts=False),
            "positive-counts": Tally(density=density, sign=1, counts=True),
            "negative-counts": Tally(density=density, sign=-1, counts=True),
        }
        elected = Elected(scale=scale, zero=self.zero, normalize=self.normalize)
        return UpdateRule(parts, lambda history: scale, lambda history: elected)


class Tally(Method):
    """One of the four sums with which TIES is continued: of the trimmed changes of one sign, or of their number.

    Merges (the sum so far, the next model's change).
    """

    name: ClassVar[str] = "tally"
    summary: ClassVar[str] = "sum, or number, of trimmed changes of one sign"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    density: float = Field(description="share of the next change that is kept, the largest magnitudes")
    sign: Literal[1, -1] = Field(description="the sign of the changes that count")
    counts: bool = Field(description="add 1 for each change instead of its magnitude")

    def required_statistics(self) -> tuple[Statistic, ...]:
        if self.density >= 1:
            return ()
        ranks = OrderStatistics((Rank.largest(self.density),), magnitudes=True)
        return (Statistic(_THRESHOLDS, ranks, lambda stack, site, statistics: stack.dense()[1:]),)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        held, following = stack.dense()
        trimmed = following if self.density >= 1 else trim(following, float(statistics[_THRESHOLDS][0, 0]))
        agreeing = torch.relu(trimmed * self.sign)
        return Dense(held + (_ones(torch.gt, agreeing) if self.counts else agreeing))


class Elected(Method):
    """TIES of four tallies: the sums of positive and of negative changes, and the numbers of both."""

    name: ClassVar[str] = "elected"
    summary: ClassVar[str] = "TIES of tallied changes"
    models: ClassVar[tuple[int, int | None]] = (4, 4)

    scale: float
    zero: Literal["majority", "plus"]
    normalize: bool

    def required_statistics(self) -> tuple[Statistic, ...]:
        majority = Statistic(_MAJORITY, Sum(), lambda stack, site, statistics: _tallied_sign(stack)[None])
        return (majority,) if self.zero == "majority" else ()

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        positive, negative, positives, negatives = stack.dense()
        otherwise = -1.0 if self.zero == "majority" and float(statistics[_MAJORITY]) < 0 else 1.0
        signs = _tallied_sign(stack)
        signs = torch.where(signs == 0, otherwise, signs)
        if self.normalize:
            positive, negative = positive / positives.clamp(min=1), negative / negatives.clamp(min=1)
        return Dense(torch.where(signs > 0, positive, -negative) * self.scale)


def _tallied_sign(stack: Stack) -> Tensor:
    positive, negative, *_ = stack.dense()
    return torch.sign(positive - negative)


def trim(values: Tensor, threshold: float) -> Tensor:
    """Return the values of at least this magnitude, and 0 for the others."""
    below = torch.nextafter(torch.tensor(threshold, dtype=values.dtype), torch.zeros((), dtype=values.dtype))
    return torch.nn.functional.hardshrink(values, float(below))


def elect(values: Sequence[Tensor], votes: Sequence[float]) -> Tensor:
    """Return the sign of ``sum_i votes_i values_i``, summed in order; equal and opposite votes cancel out exactly."""
    # each product is rounded before it is added: a fused product and sum would not cancel out exactly
    counted = [value * vote for value, vote in zip(values, votes, strict=True)]
    return sum_in_order(counted).sign_()


def agreeing_mean(values: Sequence[Tensor], signs: Tensor, weights: Sequence[Any], normalize: bool) -> Tensor:
    """Return the weighted sum of the changes that have the elected sign, with ``normalize`` their weighted mean.

    ``signs`` are 1 or -1, and a negative weight reverses its change.
    """
    sizes = [abs(weight) for weight in weights]
    # changes that agree, as positive numbers: a masked selection takes thirty times as long
    agreeing = [
        torch.relu(value * signs if number(weight) >= 0 else -value * signs)
        for value, weight in zip(values, weights, strict=True)
    ]
    total = weighted_sum(agreeing, sizes) * signs
    if not normalize:
        return total
    mass = weighted_sum([_ones(torch.gt, each) for each in agreeing], sizes)
    return total / (mass + _ones(torch.eq, mass))


def _ones(compare: Callable[..., Tensor], values: Tensor) -> Tensor:
    """Return 1 where the comparison of values with 0 holds, else 0, in their type."""
    return compare(values.detach(), 0, out=torch.empty_like(values, requires_grad=False))
