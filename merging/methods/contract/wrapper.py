"""The contract of methods around a method: a transformation of the changes, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Coefficient
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues
from merging.methods.contract.method import Grain, Method, ResultStatistic, StackFunction, Statistic, Statistics

__all__ = ["Unwrapped", "Wrapper", "unwrap_outer"]


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A stack as a wrapper transformed it: the method left to apply, its stack and site, and the way back.

    ``metrics`` are numbers to report of this tensor, by name; a merge reports their means over the tensors.
    """

    then: Method
    stack: Stack
    site: Site
    rewrap: Callable[[Delta], Delta]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Wrapper(Method):
    """A method that transforms the changes, lets ``then`` merge them, and may transform the result back."""

    then: Method = Field(description="the method inside")

    needs_whole: ClassVar[bool] = False
    """Whether :meth:`unwrap` needs the whole tensor, not a block. It then takes factors as they are, and has no
    statistics of its own."""

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        """A wrapper hands changes to any method: `dare+linear` is the mean of thinned changes."""
        return self.then.merge_space if self.transparent else "delta"

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if self.needs_whole else self.then.grain_at(site)

    @property
    def factored(self) -> bool:
        return self.then.factored

    def merged_rank(self, ranks: Sequence[int]) -> int:
        return self.then.merged_rank(ranks)

    @property
    def needs_base(self) -> bool:
        return self.then.needs_base

    @property
    def takes_factors(self) -> bool:
        return self.needs_whole or (self.transparent and self.then.takes_factors) or self.factored

    @property
    def transparent(self) -> bool:
        """Whether it hands the changes on as they are, and acts on the result only."""
        return type(self).unwrap is Wrapper.unwrap

    @property
    def rescales(self) -> bool:
        return type(self).factor is not Wrapper.factor or self.then.rescales

    @property
    def by_depth(self) -> bool:
        return super().by_depth or self.then.by_depth

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        return self.then.result_statistics(models)

    def check(self, models: int) -> None:
        super().check(models)
        self.then.check(models)
        if self.then.needs_base and not self.transparent:
            raise OptionError(
                f"{self.then.name} looks at the base's weights, and {self.name} hands on other values: in a chain "
                f"{self.name} comes after it"
            )

    def at(self, site: Site) -> Method:
        own, then = super().at(site), self.then.at(site)
        return own if then is self.then else own.model_copy(update={"then": then})

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        """Transform the stack for ``then`` to merge. The result says how to transform the merged change back."""
        return Unwrapped(self.then, stack, site, lambda merged: merged)

    def required_statistics(self) -> tuple[Statistic, ...]:
        def inside(of: StackFunction) -> StackFunction:
            def unwrapped_of(stack: Stack, site: Site, statistics: Statistics) -> Tensor | StoredValues:
                unwrapped = self.unwrap(stack, site, statistics)
                return of(unwrapped.stack, unwrapped.site, statistics)

            return unwrapped_of

        return tuple(replace(each, measure=inside(each.measure)) for each in self.then.required_statistics())

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        unwrapped = self.unwrap(stack, site, statistics)
        unwrapped.stack.layer_statistics = stack.layer_statistics
        return unwrapped.rewrap(unwrapped.then.merge(unwrapped.stack, unwrapped.site, statistics))

    def coefficients(self, models: int) -> list[Any]:
        return self.then.coefficients(models)

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        return self.then.factor(site, statistics, models)

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        return self.then.metrics(statistics, models)

    def links(self) -> list[Method]:
        return [self, *self.then.links()]


def unwrap_outer(method: Method, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
    """Apply the outer wrappers that need whole tensors, and return the method left to apply inside.

    ``stack`` holds a whole tensor. Called once for all statistics of the tensor and its merge, as it may be slow.
    """
    rewraps: list[Callable[[Delta], Delta]] = []
    metrics: dict[str, float] = {}
    method = method.expansion or method
    while isinstance(method, Wrapper) and (method.needs_whole or method.transparent):
        unwrapped = method.unwrap(stack, site, statistics)
        unwrapped.stack.layer_statistics = stack.layer_statistics
        method, stack, site = unwrapped.then.expansion or unwrapped.then, unwrapped.stack, unwrapped.site
        rewraps.insert(0, unwrapped.rewrap)
        metrics |= unwrapped.metrics

    def rewrap(merged: Delta) -> Delta:
        for each in rewraps:
            merged = each(merged)
        return merged

    return Unwrapped(method, stack, site, rewrap, metrics)
