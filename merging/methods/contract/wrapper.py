"""The contract of a method around another: what it makes of the changes, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from merging.maths.delta import Delta, Stack
from merging.maths.parameters import Coefficient
from merging.maths.site import Site
from merging.methods.contract.method import Closing, Grain, Method, Round, Seen

__all__ = ["Entered", "Wrapper", "descend"]


@dataclass(frozen=True, slots=True)
class Entered:
    """What a wrapper made of a stack: what is left to do, on what, and the way back.

    ``facts`` are numbers worth telling of this tensor, by name; their means over the tensors are reported.
    """

    then: Method
    stack: Stack
    site: Site
    leave: Callable[[Delta], Delta]
    facts: Mapping[str, float] = field(default_factory=dict)


class Wrapper(Method):
    """A method around another: what it makes of the changes goes to ``then``, and what comes back it may finish."""

    then: Method = Field(description="the method inside")

    whole: ClassVar[bool] = False
    """Whether :meth:`enter` must see all of a tensor, not a block. It then takes factors as they are, and has no rounds
    of its own."""

    @property
    def origin(self) -> Literal["base", "none"]:
        """What it makes of changes, any method may merge: `dare+linear` is the mean of thinned changes."""
        return self.then.origin if self.transparent else "base"

    @property
    def grain(self) -> Grain:
        return "matrix" if self.whole else self.then.grain

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if self.whole else self.then.grain_at(site)

    @property
    def factored(self) -> bool:
        return self.then.factored

    @property
    def takes_factors(self) -> bool:
        return self.whole or (self.transparent and self.then.takes_factors) or self.factored

    @property
    def transparent(self) -> bool:
        """Whether it leaves the changes as they are, and acts elsewhere."""
        return type(self).enter is Wrapper.enter

    @property
    def rescales(self) -> bool:
        return self.then.rescales

    @property
    def by_depth(self) -> bool:
        return super().by_depth or self.then.by_depth

    def closings(self, models: int) -> tuple[Closing, ...]:
        return self.then.closings(models)

    def check(self, models: int) -> None:
        super().check(models)
        self.then.check(models)

    def at(self, site: Site) -> Method:
        own, then = super().at(site), self.then.at(site)
        return own if then is self.then else own.model_copy(update={"then": then})

    def enter(self, stack: Stack, site: Site, seen: Seen) -> Entered:
        """What ``then`` works on, and the way back out of it."""
        return Entered(self.then, stack, site, lambda merged: merged)

    def rounds(self) -> tuple[Round, ...]:
        def inside(of: Callable[[Stack, Site, Seen], Tensor]) -> Callable[[Stack, Site, Seen], Tensor]:
            def entered_of(stack: Stack, site: Site, seen: Seen) -> Tensor:
                entered = self.enter(stack, site, seen)
                return of(entered.stack, entered.site, seen)

            return entered_of

        return tuple(replace(each, of=inside(each.of)) for each in self.then.rounds())

    def merge(self, stack: Stack, site: Site, seen: Seen) -> Delta:
        entered = self.enter(stack, site, seen)
        return entered.leave(entered.then.merge(entered.stack, entered.site, seen))

    def coefficients(self, models: int) -> list[Any]:
        return self.then.coefficients(models)

    def factor(self, site: Site, seen: Seen, models: int) -> Coefficient:
        return self.then.factor(site, seen, models)

    def facts(self, seen: Seen, models: int) -> dict[str, float]:
        return self.then.facts(seen, models)

    def links(self) -> list[Method]:
        return [self, *self.then.links()]


def descend(method: Method, stack: Stack, site: Site, seen: Seen) -> Entered:
    """Go through the outer wrappers that see whole tensors, down to the method that is left to do inside.

    ``stack`` is all of a tensor. Done once for all rounds of the tensor and its merge, however dear.
    """
    leaves: list[Callable[[Delta], Delta]] = []
    facts: dict[str, float] = {}
    method = method.inside or method
    while isinstance(method, Wrapper) and (method.whole or method.transparent):
        entered = method.enter(stack, site, seen)
        method, stack, site = entered.then.inside or entered.then, entered.stack, entered.site
        leaves.insert(0, entered.leave)
        facts |= entered.facts

    def leave(merged: Delta) -> Delta:
        for each in leaves:
            merged = each(merged)
        return merged

    return Entered(method, stack, site, leave, facts)
