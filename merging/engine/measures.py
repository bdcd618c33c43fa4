"""Measures of a merge for its report: sums over the elements of each tensor, gathered by any number of workers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, isfinite, sqrt

from merging.maths.sums import safe_ratio

__all__ = ["Measure", "Measures"]

_COMMON = 7
"""The numbers of a measure that no model has for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Sums over the elements of a tensor, or of several.

    Where nothing says what the models changed, ``merged`` is of the merged weights, and ``changes`` are of the
    differences of each model from them.

    Attributes:
        elements: the number of elements.
        sampled: the number of elements in which interference is measured.
        base: the sum of the squares of the base's values; 0 without a base.
        merged: the sum of the squares of the merged change.
        magnitude: the sum of the magnitudes of all models' changes, each times its weight, in sampled elements.
        net: the sum of the magnitudes of the sum of these.
        conflicting: the part of ``magnitude`` in elements where models change in opposite directions.
        changes: the sum of the squares of each model's change.
        products: the inner product of each model's change and the merged one.
        parts: the same, times the model's weight.
    """

    elements: float
    sampled: float
    base: float
    merged: float
    magnitude: float
    net: float
    conflicting: float
    changes: tuple[float, ...]
    products: tuple[float, ...]
    parts: tuple[float, ...]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Measure:
        """Return a measure from its numbers, as :meth:`numbers` returns them."""
        models = (len(numbers) - _COMMON) // 3
        rows = [tuple(numbers[_COMMON + models * row : _COMMON + models * (row + 1)]) for row in range(3)]
        elements, sampled, base, merged, magnitude, net, conflicting = numbers[:_COMMON]
        return cls(
            elements=elements,
            sampled=sampled,
            base=base,
            merged=merged,
            magnitude=magnitude,
            net=net,
            conflicting=conflicting,
            changes=rows[0],
            products=rows[1],
            parts=rows[2],
        )

    @classmethod
    def total(cls, measures: Iterable[Measure]) -> Measure:
        """Return the sums over all of the measures, rounded once; there is at least one.

        The magnitudes of sampled elements stand for the others of their tensor.
        """
        columns = zip(*(each.scaled().numbers() for each in measures), strict=True)
        return cls.of_numbers([fsum(column) for column in columns])

    def numbers(self) -> list[float]:
        """Return all sums in a row."""
        magnitudes = [self.magnitude, self.net, self.conflicting]
        common = [self.elements, self.sampled, self.base, self.merged, *magnitudes]
        return [*common, *self.changes, *self.products, *self.parts]

    def scaled(self) -> Measure:
        """Return the measure with magnitudes as of all elements."""
        times = safe_ratio(self.elements, self.sampled)
        return replace(
            self,
            magnitude=times * self.magnitude,
            net=times * self.net,
            conflicting=times * self.conflicting,
            sampled=self.elements if times else 0.0,
        )

    @property
    def norm(self) -> float:
        """The norm of the merged change."""
        return sqrt(self.merged)

    @property
    def norms(self) -> tuple[float, ...]:
        """The norm of each model's change."""
        return tuple(map(sqrt, self.changes))

    @property
    def relative(self) -> float | None:
        """The norm of the merged change, relative to the base's; None without a base."""
        return sqrt(self.merged / self.base) if self.base else None

    @property
    def cosines(self) -> tuple[float | None, ...]:
        """The cosine between each model's change and the merged one; None where one of them is zero."""
        norms = [sqrt(self.merged) * sqrt(each) for each in self.changes]
        return tuple(
            min(1.0, max(-1.0, product / norm)) if norm else None
            for product, norm in zip(self.products, norms, strict=True)
        )

    @property
    def kept(self) -> tuple[float | None, ...]:
        """The part of each model's change that is in the merged one: 1 where it is there in full."""
        return tuple(
            product / square if square else None for product, square in zip(self.products, self.changes, strict=True)
        )

    @property
    def shares(self) -> tuple[float | None, ...]:
        """Each model's share of the merged change along it. The shares add up to 1."""
        whole = fsum(self.parts)
        return tuple(part / whole if whole else None for part in self.parts)

    @property
    def cancelled(self) -> float | None:
        """The share of the magnitudes that the models cancel: 1 - |sum| / sum of magnitudes."""
        return 1 - safe_ratio(self.net, self.magnitude) if self.magnitude else None

    @property
    def conflict(self) -> float | None:
        """The share of the magnitudes in elements where models change in opposite directions."""
        return safe_ratio(self.conflicting, self.magnitude) if self.magnitude else None


class Measures:
    """Measures by tensor, from units of work in any order: sums do not depend on the workers that share the units.

    Attributes:
        unmeasured: tensors with values that have no sum, such as infinities.
        seconds: the time of all workers together in parts of their work, by name.
    """

    def __init__(self) -> None:
        self.unmeasured: set[str] = set()
        self.seconds: dict[str, float] = {}
        self._units: dict[str, array[float]] = {}

    def add(self, name: str, numbers: Sequence[float]) -> None:
        """Take in the numbers of one unit of a tensor; see :meth:`Measure.numbers`."""
        if all(map(isfinite, numbers)):
            self._units.setdefault(name, array("d", [len(numbers)])).extend(numbers)
        else:
            self.unmeasured.add(name)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add the time of a worker."""
        for part, value in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value

    def merge(self, other: Measures) -> None:
        """Join the measures of another worker."""
        self.unmeasured |= other.unmeasured
        self.add_seconds(other.seconds)
        for name, units in other._units.items():
            self._units.setdefault(name, units[:1]).extend(units[1:])

    def results(self) -> dict[str, Measure]:
        """Return the measure of each tensor, whose sums are rounded once."""
        found = {}
        for name, (width, *numbers) in self._units.items():
            if name not in self.unmeasured:
                found[name] = Measure.of_numbers([fsum(numbers[column :: int(width)]) for column in range(int(width))])
        return found
