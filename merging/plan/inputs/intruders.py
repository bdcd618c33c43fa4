"""The reduction of intruder dimensions in the changes of a plan's items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from merging.errors import InputError, OptionError, option
from merging.plan.intruder_settings import IntruderSettings
from merging.plan.items import Item
from merging.sources.changes import Change, FullChange
from merging.sources.reduced_intruders import ReducedIntruders
from merging.sources.stored import Stored

__all__ = ["reduce_intruders"]

_REASON = "intruder dimensions are found in the sum of the base and the change"


def reduce_intruders(items: Iterable[Item], settings: IntruderSettings | None) -> tuple[list[Item], list[str]]:
    """Return the items with the changes of linear layers and convolutions reduced, and a remark on all others.

    Raises:
        OptionError: if there is nothing to reduce.
        InputError: for a layer whose base is not one tensor.
    """
    items = list(items)
    if settings is None:
        return items, []
    reduced, others = [], 0
    for item in items:
        changes = [each for each in item.inputs if isinstance(each, Change)]
        if any(map(_is_reducible, changes)):
            if item.base is None:
                raise InputError(f"{item.site.name}: the base holds it in several tensors, and {_REASON}")
            item = replace(item, inputs=tuple(_reduce(each, settings) for each in item.inputs))
        else:
            others += any(each.rank for each in changes)
        reduced.append(item)
    if all(one is other for one, other in zip(items, reduced, strict=True)):
        raise OptionError(
            f"{option('reduce_intruders', True)} is for adapters of linear layers and convolutions, and there are none"
        )
    return reduced, [f"intruders of {others} embeddings and stacks of experts are not reduced"] if others else []


def _is_reducible(change: Change) -> bool:
    return change.kind in ("linear", "conv") and not isinstance(change, FullChange)


def _reduce(change: Stored | Change | None, settings: IntruderSettings) -> Stored | Change | None:
    if not isinstance(change, Change) or not _is_reducible(change):
        return change
    return ReducedIntruders(
        change.target,
        change.kind,
        change=change,
        factor=settings.factor,
        threshold=settings.threshold,
        leading=settings.leading,
        needs_base=change.needs_base or _REASON,
        optional=change.optional,
    )
