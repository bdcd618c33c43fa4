"""Breadcrumbs: drop the largest and the smallest changes of each tensor, before any method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.coefficients import column, spread
from merging.maths.delta import Stack
from merging.maths.kernels.drop_steps import keep_bands
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.order_statistics import Rank
from merging.maths.parameters import Local, PerModel, varies
from merging.maths.radix_selection import OrderStatistics
from merging.maths.site import Site
from merging.methods.contract.method import Statistic, Statistics, stored_changes
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.families.l1_norms import l1_ratios, l1_statistic
from merging.methods.ties import trim

__all__ = ["Breadcrumbs"]

_ENDS, _NORMS = "breadcrumbs.ends", "breadcrumbs.norms"


class Breadcrumbs(Wrapper):
    """Drop the share `gamma` of each tensor's change with the largest magnitudes, then the smallest until `density` is
    left. If both are impossible, fewer of the largest are dropped.

    Dropped entries are 0. With `keep_norm` the kept entries are multiplied so that each tensor keeps its L1 norm.
    Outliers are taken to be as harmful as noise, which other sparsifiers keep. Entries equal to a threshold are kept
    (bfloat16 checkpoints have many exact ties). On adapters the merged change has full rank. Costs a sample and a sweep
    over each tensor before the merge, two sweeps with `keep_norm`.
    """

    name: ClassVar[str] = "breadcrumbs"
    summary: ClassVar[str] = "drop the largest and the smallest changes"
    paper: ClassVar[str] = "Model Breadcrumbs, Davari and Belilovsky 2023, arXiv 2312.06795"
    workspace: ClassVar[int] = 4

    density: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.9, description="share of each model's change that is kept; one for all, or one each"
    )
    gamma: PerModel[Annotated[float, Field(ge=0, lt=1)]] = Field(
        0.01, description="share of the largest that is dropped; one for all, or one each"
    )
    keep_norm: Local[bool] = Field(False, description="multiply what is kept so that each tensor keeps its L1 norm")

    @property
    def factored(self) -> bool:
        return False

    def _bands(self) -> list[tuple[float, float]]:
        """Return each density with each gamma that occurs, without densities of 0 and 1, which need no thresholds."""
        densities, gammas = (sorted({*spread(each, 1)}) for each in (self.density, self.gamma))
        return [band for band in product(densities, gammas) if 0 < band[0] < 1]

    def idle(self, site: Site) -> Mapping[str, str]:
        everything = "a density of 1 keeps everything"
        return {} if self._bands() else {"gamma": everything, "keep_norm": everything}

    def required_statistics(self) -> tuple[Statistic, ...]:
        if varies(self.density) or varies(self.gamma) or not self._bands():
            return super().required_statistics()
        ranks = tuple(rank for band in self._bands() for rank in Rank.band(*band))
        own = Statistic(_ENDS, OrderStatistics(ranks, magnitudes=True), stored_changes, per="tensor")
        norms = l1_statistic(_NORMS, lambda stack, site, statistics: self._keep(stack, statistics))
        return (own, *((norms,) if self.keep_norm else ()), *super().required_statistics())

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        kept = self._keep(stack, statistics)
        if self.keep_norm and self._bands():
            kept *= column(l1_ratios(statistics, _NORMS), kept)
        return Unwrapped(self.then, Stack.of(kept, stack.models, stack.present), site, lambda merged: merged)

    def _keep(self, stack: Stack, statistics: Statistics) -> Tensor:
        """Return the changes ``[n, *shape]``, 0 where they are dropped."""
        bands = self._bands()
        densities, gammas = spread(self.density, len(stack)), spread(self.gamma, len(stack))
        ends: list[tuple[float, float] | None] = []
        for model, band in enumerate(zip(densities, gammas, strict=True)):
            first = 2 * bands.index(band) if 0 < band[0] < 1 else None
            ends.append(None if first is None else tuple(statistics[_ENDS][model, first : first + 2].tolist()))
        cut = [each for each in ends if each is not None]
        banded = keep_bands(stack, cut) if len(cut) == len(ends) else None
        if banded is not None:
            return banded
        values = stack.dense()
        kept = torch.empty_like(values)
        for value, density, own, into in zip(values, densities, ends, kept, strict=True):
            if own is None:
                into.copy_(value if density else torch.zeros_like(value))
            else:
                into.copy_(within(value, *own))
        return kept


def within(values: Tensor, low: float, high: float) -> Tensor:
    """Return the values of magnitudes from low to high, both included, and 0 for the others."""
    return trim(values, low).sub_(torch.nn.functional.hardshrink(values, high))
