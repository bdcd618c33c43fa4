"""The tensors of an output, as the planning of a model or of an adapter returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merging.maths.site import Site
from merging.plan.items import Constant, Item
from merging.plan.recipe import AdapterFormat

__all__ = ["PlannedOutput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOutput:
    """The tensors of an output and the choices made for it.

    Attributes:
        items: one item a tensor of the merge.
        matched: one line a model about how its names were matched.
        notices: remarks for people.
        untouched: the sites of tensors that no model touches, as its weight by block, or the rank of its change, is 0.
        guess: a remark on a number of blocks that is only a guess, for methods that go by depth.
        untied: whether the output has a head of its own although the reference's config ties it.
        rank: the largest rank of a merged adapter's factors.
        ranks: the rank of each tensor's factors.
        format: the name of the form of a merged adapter's file.
        header: the program whose entries the file's header has, if it has any.
        constants: numbers that the file holds in addition.
    """

    items: list[Item]
    matched: list[str]
    notices: list[str]
    untouched: list[Site] = field(default_factory=list)
    guess: str | None = None
    untied: bool = False
    rank: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    format: str = "peft"
    header: AdapterFormat | None = "peft"
    constants: tuple[Constant, ...] = ()
