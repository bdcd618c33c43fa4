"""The rows of denoisers' tensors under two sets of names, where one set fuses projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.maths.shapes import Shapes
from merging.sources.denoisers import NUMBER, NameRule, family_of, flat_name, respell

__all__ = ["NameSet", "RowRange", "paired_names"]

NameSet = Literal["diffusers", "published"]
"""Whose names they are: the library's, or the publisher's."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """``length`` rows of a stored tensor from ``start`` on."""

    name: str
    start: int
    length: int


def paired_names(shapes: Shapes) -> Iterator[tuple[NameSet, str, tuple[RowRange, ...]]]:
    """Yield the style of a name, the name, and the rows of the given tensors that it stands for.

    ``shapes`` are the shapes of some of a denoiser's tensors, under either set of names, in any program's spelling.
    Tensors without a rule are left out.
    """
    family = family_of(shapes)
    rules = {_normal(name): rule for rule in (family.rules if family else ()) for name in _names(rule)}
    stored = {_normal(name): name for name in shapes}
    done = set()
    for name in stored:
        module, _, leaf = name.rpartition(".")
        whole = rules.get(name) or rules.get(_pattern(name))
        rule = whole or rules.get(module) or rules.get(_pattern(module))
        if rule is None:
            continue
        number = NUMBER.search(name)
        block, ending = number[0] if number else "", "" if whole else f".{leaf}"
        if (rule.published, block, ending) not in done:
            done.add((rule.published, block, ending))
            yield from _pair(_Place(rule, block, ending, stored, shapes))


def _normal(name: str) -> str:
    return respell(flat_name(name))


def _names(rule: NameRule) -> tuple[str, ...]:
    return rule.published, *rule.diffusers


def _pattern(name: str) -> str:
    return NUMBER.sub("{}", name, count=1)


@dataclass(frozen=True, slots=True)
class _Place:
    """A rule in one block, for weights, biases or parameters; ``stored`` are the tensors' names by normal form."""

    rule: NameRule
    block: str
    ending: str
    stored: Mapping[str, str]
    shapes: Shapes

    def name(self, module: str) -> str:
        return module.format(self.block) + self.ending

    def find(self, module: str) -> str | None:
        """Return the name under which a module's tensor is stored, None for a missing one."""
        return self.stored.get(_normal(self.name(module)))

    def weight(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight; empty for a missing one."""
        return self.shapes.get(self.stored.get(_normal(module.format(self.block) + ".weight"), ""), ())


def _pair(place: _Place) -> Iterator[tuple[NameSet, str, tuple[RowRange, ...]]]:
    """Yield the names of one rule in one block, and their rows."""
    rule, shapes = place.rule, place.shapes
    published = place.find(rule.published)
    if published is not None:
        weight = place.weight(rule.published)
        sizes = _sizes(rule, shapes[published][0], weight)
        yield "published", place.name(rule.published), (RowRange(published, 0, shapes[published][0]),)
        start = 0
        for module, size in zip(rule.diffusers, sizes, strict=False):
            yield "diffusers", place.name(module), _reorder(rule, (RowRange(published, start, size),), weight)
            start += size
        return
    found = {module: name for module in rule.diffusers if (name := place.find(module)) is not None}
    rows = {module: RowRange(name, 0, shapes[name][0]) for module, name in found.items()}
    for module, part in rows.items():
        yield "diffusers", place.name(module), (part,)
    if len(rows) == len(rule.diffusers):
        yield (
            "published",
            place.name(rule.published),
            _reorder(rule, tuple(rows.values()), place.weight(rule.diffusers[0])),
        )


def _sizes(rule: NameRule, total: int, weight: tuple[int, ...]) -> list[int]:
    """Return the number of rows of each of diffusers' modules; empty if it cannot be determined."""
    parts = len(rule.diffusers)
    if not rule.narrow and not rule.grouped:
        return [total // parts] * parts if total % parts == 0 else []
    width = weight[1] if len(weight) == 2 else total
    rest = total - (parts - 1) * width
    if rule.grouped:
        others, odd = divmod(total - width, parts - 1)
        return [width, *[others] * (parts - 1)] if others > 0 and not odd else []
    return [*[width] * (parts - 1), rest] if rest > 0 else []


def _reorder(rule: NameRule, rows: tuple[RowRange, ...], weight: tuple[int, ...]) -> tuple[RowRange, ...]:
    """Swap the halves of a module that only scales and shifts, or that gates."""
    (first, *others) = rows
    scales = rule.swapped and not others and len(weight) == 2 and weight[0] == 2 * weight[1]
    if not scales and not rule.gated:
        return rows
    half = first.length // 2
    return RowRange(first.name, first.start + half, half), RowRange(first.name, first.start, half)
