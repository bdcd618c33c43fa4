"""How a tensor of a merge is cut into pieces that are merged on their own: decided here, and read by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["COPIED", "Cut", "cut_rows", "cut_stack", "cut_tensor"]

_ROWS = 64
"""Rows that stay together in a product: its last bits depend on the number of rows in it, which no limit may change."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is cut into pieces, and whether several workers may share it.

    Attributes:
        way: the form of the pieces. ``elements``: runs of any elements, as all inputs are stored in full. ``rows``:
            runs of whole rows (see :attr:`~merging.maths.site.Site.row`). ``blocks``: blocks of the first axis, where
            inputs are factors or computed. ``whole``: the tensor in one piece. ``factors``: the same, with all changes
            kept as factors; by blocks where they have to be multiplied out.
        granule: the number of elements that must stay together; every piece but the last has a multiple of it.
        splits: whether several workers may share the tensor.
    """

    way: Literal["elements", "rows", "blocks", "whole", "factors"]
    granule: int = 1
    splits: bool = False

    def elements(self, size: int) -> int:
        """Return the number of elements in a piece of about ``size``, at least one granule."""
        granule = max(1, self.granule)
        return granule * max(1, size // granule)

    def shape(self, site: Site) -> tuple[int, ...]:
        """Return the shape of a piece of a tensor, with -1 for the axis that is cut."""
        if self.way == "elements":
            return (-1,)
        if self.way == "rows":
            return (-1, site.row)
        return site.shape if self.way == "whole" else (-1, *site.shape[1:])


_ELEMENTS = {splits: Cut("elements", splits=splits) for splits in (False, True)}

COPIED = _ELEMENTS[True]
"""The cut of a tensor that is copied."""


def cut_tensor(site: Site, inputs: Sequence[Stored | Change | None], method: Method, weights: bool) -> Cut:
    """Decide how a tensor is cut that a method merges; ``weights`` says that it merges weights and not changes."""
    grain = method.grain_at(site)
    changes = [each for each in inputs if isinstance(each, Change)]
    low_rank = changes and all(each is None or (isinstance(each, Change) and each.low_rank) for each in inputs)
    if low_rank and not weights and method.takes_factors:
        return Cut("factors", _granule(site, grain))
    if grain == "matrix":
        return Cut("whole", prod(site.shape))
    if changes:
        return Cut("blocks", _granule(site, grain))
    splits = not any(each.per == "tensor" for each in method.required_statistics())
    return Cut("rows", site.row, splits) if grain == "row" else _ELEMENTS[splits]


def cut_stack(site: Site, low_rank: bool, method: Method) -> Cut:
    """Decide how a whole stack is cut for the method inside the outer wrappers; ``low_rank``: it holds factors."""
    grain = method.grain_at(site)
    if low_rank and method.factored:
        return Cut("factors", prod(site.shape))
    if grain == "matrix" or not site.shape:
        return Cut("whole", prod(site.shape))
    return Cut("blocks", _granule(site, grain))


def cut_rows(columns: int, experts: bool = False) -> Cut:
    """Decide how a product of this many columns is cut into rows; of ``experts`` each row is a product of its own."""
    return Cut("blocks", columns * (1 if experts else _ROWS))


def _granule(site: Site, grain: Grain) -> int:
    """Return the number of elements that stay together in blocks of the first axis."""
    if grain == "row" and site.kind == "vector":
        return prod(site.shape)
    return cut_rows(prod(site.shape[1:]), site.kind == "experts").granule if site.shape else 1
