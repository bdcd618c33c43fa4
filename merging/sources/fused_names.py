"""The rows of denoisers' tensors under two sets of names, where one set fuses projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from merging.maths.shapes import Shapes
from merging.sources.denoisers import NUMBER, NameRule, family_of

__all__ = ["NameSet", "RowRange", "paired_names"]

"""Shapes of tensors by name."""

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

    ``shapes`` are the shapes of some of a denoiser's tensors, under either set of names. Tensors without a rule are
    left out.
    """
    family = family_of(shapes)
    by_name = {name: rule for rule in (family.rules if family else ()) for name in (rule.published, *rule.diffusers)}
    done = set()
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        rule = by_name.get(_pattern(name)) or (by_name.get(_pattern(module)) if leaf in ("weight", "bias") else None)
        if rule is None:
            continue
        number = NUMBER.search(name)
        block, ending = number[0] if number else "", "" if _pattern(name) in by_name else f".{leaf}"
        if (rule.published, block, ending) not in done:
            done.add((rule.published, block, ending))
            yield from _pair(rule, block, ending, shapes)


def _pattern(name: str) -> str:
    return NUMBER.sub("{}", name, count=1)


def _pair(
    rule: NameRule, block: str, ending: str, shapes: Shapes
) -> Iterator[tuple[NameSet, str, tuple[RowRange, ...]]]:
    """Yield the names of one rule in one block, and their rows."""
    published = rule.published.format(block) + ending
    diffusers = [each.format(block) + ending for each in rule.diffusers]
    if published in shapes:
        total = shapes[published][0]
        weight = shapes.get(f"{rule.published.format(block)}.weight", ())
        sizes = _sizes(rule, total, weight)
        yield "published", published, (RowRange(published, 0, total),)
        start = 0
        for name, size in zip(diffusers, sizes, strict=False):
            yield "diffusers", name, _swap_halves(rule, (RowRange(published, start, size),), weight)
            start += size
        return
    whole = {name: (RowRange(name, 0, shapes[name][0]),) for name in diffusers if name in shapes}
    for name, rows in whole.items():
        yield "diffusers", name, rows
    if len(whole) == len(diffusers):
        weight = shapes.get(f"{rule.diffusers[0].format(block)}.weight", ())
        yield "published", published, _swap_halves(rule, tuple(row for rows in whole.values() for row in rows), weight)


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


def _swap_halves(rule: NameRule, rows: tuple[RowRange, ...], weight: tuple[int, ...]) -> tuple[RowRange, ...]:
    """Swap the halves of a module that only scales and shifts."""
    (first, *others) = rows
    if not rule.swapped or others or len(weight) != 2 or weight[0] != 2 * weight[1]:
        return rows
    half = first.length // 2
    return RowRange(first.name, first.start + half, half), RowRange(first.name, first.start, half)
