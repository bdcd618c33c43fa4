"""The items of a plan: for every tensor its inputs, its cut, and the tensors of the output that it makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from merging.display.tables import Displayed
from merging.maths.layer_statistics import LayerStatistics
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.contract.method import Method
from merging.methods.passthrough import Passthrough
from merging.plan.cuts import COPIED, Cut, cut_tensor
from merging.sources.changes import Change
from merging.sources.stored import Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["CHUNK", "TILE", "Constant", "Item", "ItemForm", "Placing", "cut_items"]

TILE = 1 << 19
"""Elements of one model that are merged at a time on a CPU: two megabytes, so that a few models fit into its caches.

Smaller tiles would stay closer to a core, but then Python's lock between the threads is felt (measured: with 32 Ki
elements a merge takes three times as long on two cores). Part of what the output's bytes depend on, so that no limit
changes it.
"""

CHUNK = 1 << 22
"""Elements in one unit of work, a multiple of TILE."""

ItemForm = Literal["copy", "dense", "delta", "factors"]
"""The form of an item in the output: the base's bytes, the merged tensor, its change in full, or its change as
factors."""


@dataclass(frozen=True, slots=True)
class Placing:
    """The place of factors in tensors of the output that hold more than them, or only some of their rows.

    Attributes:
        down: the tensor for the lower factor; None where it is written already.
        up: the tensor for the upper factor.
        rows: the rows of the upper factor that go into ``up``.
        first: the first row of ``up`` that they take.
        term: the first row of ``down``, and the first column of ``up``, that the factors take. The other columns of
            these rows are zeros.
        expert: the number of the expert whose factors they are, None for other tensors.
        stack: the number of the matrix in a stack of the output, None for tensors that are no stacks.
        heads: the number of heads by which the rows are ordered as llama.cpp orders them; 0 for their own order.
        turned: whether ``down`` is written transposed.
    """

    down: OutputTensor | None
    up: OutputTensor
    rows: slice
    first: int
    term: int
    expert: int | None = None
    stack: int | None = None
    heads: int = 0
    turned: bool = False

    @property
    def width(self) -> int:
        """The columns of ``up``."""
        return self.up.shape[1] if self.stack is None else self.up.shape[2]

    @property
    def first_down(self) -> int:
        """The first row of ``down``."""
        return self.term if self.stack is None else self.stack * self.width


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that is written into a tensor of the output ``count`` times, from its element ``start`` on."""

    out: OutputTensor
    value: float
    start: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Item(Displayed):
    """One tensor of the merge.

    Attributes:
        site: the tensor's name, shape, kind and position.
        inputs: one entry a model; None for a model that does not touch the tensor.
        base: the base's tensor, None where it is not read.
        outs: the tensors of the output that the item writes.
        form: what is written: the base's bytes (``copy``), the merged tensor (``dense``), the merged change
            (``delta``), or the factors of that change (``factors``: down, then up).
        written: a number that multiplies factors when they are written, where a reader of the output multiplies them
            by its inverse.
        placings: the places of factors, unless they go into ``outs``.
        cut: how the tensor is cut into pieces.
        scales: the number that each model's change is multiplied by; empty if all are 1.
        layer_statistics: the statistics of examples of each model, where the method needs them.
    """

    site: Site
    inputs: tuple[Stored | Change | None, ...]
    base: Stored | None
    outs: tuple[OutputTensor, ...]
    form: ItemForm
    written: float = 1.0
    placings: tuple[Placing, ...] = ()
    cut: Cut = COPIED
    scales: tuple[float, ...] = ()
    layer_statistics: tuple[LayerStatistics | None, ...] = ()

    def _display_fields(self) -> dict[str, object]:
        facts = {"name": self.site.name, "shape": self.site.shape, "kind": self.site.kind, "form": self.form}
        return {**facts, "models": sum(each is not None for each in self.inputs), "outs": len(self.outs)}

    @property
    def numel(self) -> int:
        return prod(self.site.shape)

    def scale(self, slot: int) -> float:
        """Return the number that a model's change is multiplied by."""
        return self.scales[slot] if self.scales else 1.0

    @property
    def stored(self) -> list[Stored]:
        """The stored tensors that it is read from."""
        found: list[Stored] = []
        for each in (*self.inputs, self.base):
            if isinstance(each, Stored):
                found.append(each)
            elif each is not None:
                found += each.tensors
        return found

    @property
    def read_bytes(self) -> int:
        return sum([each.nbytes for each in self.stored])

    @property
    def changes(self) -> list[Change]:
        """The inputs that are changes, and not stored tensors."""
        return [each for each in self.inputs if isinstance(each, Change)]

    @property
    def factor_bytes(self) -> int:
        """The size of all changes' tensors in the type of the computation."""
        return self.itemsize * sum(prod(t.shape) for change in self.changes for t in change.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The type the item is computed in: float32, or float64 if an input or the output is."""
        return torch.float64 if self.itemsize == 8 else torch.float32

    @property
    def itemsize(self) -> int:
        """The bytes of an element of this type; known without torch."""
        names = [*(each.dtype_name for each in self.stored), *(out.dtype_name for out in self.outs)]
        return 8 if "F64" in names else 4

    def order(self) -> tuple[str, int]:
        """Return a key that sorts items in the order of their bytes in the files."""
        first = next((each for each in (self.base, *self.inputs) if each is not None), None)
        if isinstance(first, Change):
            first = first.tensors[0]
        return first.order() if first is not None else ("", 0)


def cut_items(items: Iterable[Item], method: Method, weights: bool) -> tuple[Item, ...]:
    """Return the items, each with its cut for a method; ``weights`` says that it merges weights and not changes."""
    return tuple(item if item.form == "copy" else _cut_item(item, method.at(item.site), weights) for item in items)


def _cut_item(item: Item, method: Method, weights: bool) -> Item:
    """Return an item with its cut; one that the method passes on as it is becomes a copy."""
    first = item.inputs[0]
    alone = weights and item.form == "dense" and len(item.inputs) == 1 and isinstance(first, Stored)
    if alone and isinstance(method, Passthrough) and not isinstance(method.scale, Tensor) and method.scale == 1:
        assert isinstance(first, Stored)
        if first.dtype_name == item.outs[0].dtype_name:
            return replace(item, inputs=(None,), base=first, form="copy")
    cut = cut_tensor(item.site, item.inputs, method, weights)
    return item if cut == item.cut else replace(item, cut=cut)
