"""What a plan consists of: for every tensor, where its inputs lie, what is made of them, and what is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch

from merging.maths.site import Site
from merging.methods.contract.method import Method
from merging.plan.cuts import COPIED, Cut, cut_tensor
from merging.plan.inputs.vocabulary import Vocabulary
from merging.plan.recipe import AdapterFormat, Recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.stored import DTYPES, Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["CHUNK", "KEPT", "TILE", "Constant", "Item", "ItemForm", "Placing", "Plan", "cut_items"]

TILE = 1 << 19
"""Elements of one model that are merged at a time on a CPU: two megabytes, so that a few models fit into its caches.

Smaller tiles would stay closer to a core, but then Python's lock between the threads is felt (measured: with 32 Ki
elements a merge takes three times as long on two cores). Part of what the output's bytes depend on, so that no limit
changes it.
"""

CHUNK = 1 << 22
"""Elements in one unit of work, a multiple of TILE."""

KEPT = 1 << 29
"""Most bytes of entered factors that are kept for later sweeps; where there are more, they are entered anew."""

SCATTERED = 1.8
"""Memory that a worker takes over what it has in use: blocks that were freed, and fit nothing that is wanted."""

RUN = 1 << 24
"""Bytes that a merge takes by itself: counters, threads, and what libraries load when they are first used."""

ItemForm = Literal["copy", "dense", "delta", "factors"]
"""What is written of an item."""


@dataclass(frozen=True, slots=True)
class Placing:
    """Where factors go in tensors of the output that hold more than them, or only some of their rows.

    Of experts, ``expert`` is the one whose factors they are. The lower factor goes into ``down`` from the row ``term``
    on (nowhere, if it is there already), the ``rows`` of the upper factor into ``up`` from the row ``first`` and the
    column ``term`` on, with zeros beside them.
    """

    down: OutputTensor | None
    up: OutputTensor
    rows: slice
    first: int
    term: int
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that is written into a tensor of the output ``count`` times, from its element ``start`` on."""

    out: OutputTensor
    value: float
    start: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tensor of the merge.

    ``inputs`` has one entry a model, None for a model that does not touch the tensor. ``form`` says what is written:
    the bytes of ``base`` as they are (``copy``), the merged tensor (``dense``), the merged change alone (``delta``), or
    the factors of that change (``factors``: down, then up). ``written`` is what factors are multiplied by when they are
    written, where a reader of the output multiplies them again; ``placings`` are where they go, unless into ``outs``.
    """

    site: Site
    inputs: tuple[Stored | Change | None, ...]
    base: Stored | None
    outs: tuple[OutputTensor, ...]
    form: ItemForm
    written: float = 1.0
    placings: tuple[Placing, ...] = ()
    cut: Cut = COPIED

    @property
    def numel(self) -> int:
        return prod(self.site.shape)

    @property
    def read_bytes(self) -> int:
        changes = [t for each in self.inputs if isinstance(each, Change) for t in each.tensors]
        stored = [each for each in (*self.inputs, self.base) if isinstance(each, Stored)]
        return sum(each.nbytes for each in [*changes, *stored])

    def order(self) -> tuple[str, int]:
        """Where its bytes lie, so that items can be done in the order of the files."""
        first = next((each for each in (self.base, *self.inputs) if each is not None), None)
        if isinstance(first, Change):
            first = first.tensors[0]
        return first.order() if first is not None else ("", 0)


def cut_items(items: Iterable[Item], method: Method, weights: bool) -> tuple[Item, ...]:
    """Return the items, each with its cut for a method; ``weights`` says that it merges weights and not changes."""
    return tuple(
        item if item.form == "copy" else replace(item, cut=cut_tensor(item.site, item.inputs, method, weights))
        for item in items
    )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A merge that can be carried out: everything that can be known from headers has been checked.

    ``weights`` says that the models' weights are merged themselves, not their changes from the base. ``rank`` is that
    of a merged adapter, ``format`` what the form of its file is called, ``header`` whose entries the file's header has,
    and ``constants`` what the file holds beside what is merged.
    ``untied`` says that the output writes a head of its own where the base ties it, ``vocabulary``
    whose vocabulary it has where those of the models differ in size.
    """

    recipe: Recipe
    models: tuple[Checkpoint | Adapter, ...]
    base: Checkpoint | None
    keys: tuple[str, ...]
    output: Literal["adapter", "model"]
    weights: bool
    items: tuple[Item, ...]
    rank: int = 0
    untied: bool = False
    notices: tuple[str, ...] = ()
    matched: tuple[str, ...] = field(default=())
    vocabulary: Vocabulary | None = None
    format: str = "peft"
    header: AdapterFormat | None = "peft"
    constants: tuple[Constant, ...] = ()

    @property
    def reference(self) -> Checkpoint | None:
        """The full model that the output takes after: the base, or else the first there is."""
        return self.base or next((model for model in self.models if isinstance(model, Checkpoint)), None)

    @property
    def kept(self) -> dict[str, Checkpoint]:
        """The components of a pipeline that are not merged, and are the reference's."""
        components = self.reference.components if self.reference and self.output == "model" else {}
        if not self.recipe.components:
            return {}
        return {name: each for name, each in components.items() if name not in self.recipe.components}

    @property
    def kept_bytes_on_disk(self) -> int:
        """The bytes of the weights that are copied as they are."""
        return sum(stored.nbytes for component in self.kept.values() for stored in component.tensors.values())

    @property
    def outs(self) -> list[OutputTensor]:
        """The tensors of the output, those of the largest elements first, so that all lie aligned in their file."""
        outs = {out.name: out for item in self.items for out in item.outs}
        outs |= {constant.out.name: constant.out for constant in self.constants}
        return sorted(outs.values(), key=lambda out: -DTYPES[out.dtype_name].itemsize)

    @property
    def out_bytes(self) -> int:
        return sum(out.nbytes for out in self.outs)

    @property
    def read_bytes(self) -> int:
        return sum(item.read_bytes for item in self.items)

    @property
    def kept_bytes(self) -> int:
        """The memory of what wrappers make of all factors, if later sweeps need it; 0 if that is more than KEPT."""
        method = self.recipe.method
        if not method.result_statistics(len(self.models)) and all(
            each.per == "tensor" for each in method.required_statistics()
        ):
            return 0
        total = sum(self._factor_bytes(item) for item in self.items if item.cut.way == "factors")
        return total if total <= KEPT else 0

    @property
    def spool_bytes(self) -> int:
        """The space on the disk for merged tensors that wait for the factor they are to be multiplied by."""
        method = self.recipe.method
        if not method.result_statistics(len(self.models)):
            return 0
        total = 0
        for item in self.items:
            if item.cut.way == "factors" and method.factored:
                total += self._factor_bytes(item)
            elif item.cut.way in ("factors", "whole"):
                total += self.dtype(item).itemsize * item.numel
        return total

    def _factor_bytes(self, item: Item) -> int:
        changes = [each for each in item.inputs if isinstance(each, Change)]
        return self.dtype(item).itemsize * sum(prod(t.shape) for change in changes for t in change.tensors)

    def dtype(self, item: Item) -> torch.dtype:
        """The type an item is computed in: float32, or float64 if an input or the output is."""
        changes = [t for each in item.inputs if isinstance(each, Change) for t in each.tensors]
        stored = [each for each in (*item.inputs, item.base) if isinstance(each, Stored)]
        kinds = {each.dtype_name for each in [*changes, *stored]} | {out.dtype_name for out in item.outs}
        return torch.float64 if "F64" in kinds else torch.float32

    @property
    def widest(self) -> torch.dtype:
        """The widest type that any item is computed in."""
        kinds = {self.dtype(item) for item in self.items if item.form != "copy"}
        return torch.float64 if torch.float64 in kinds else torch.float32

    def working_bytes(self, item: Item) -> int:
        """About how much memory one worker needs for an item on a CPU: inputs, buffers and results together."""
        width = self.dtype(item).itemsize
        models = len(item.inputs)
        whole = item.cut.way == "whole"
        tile = min(item.numel, max(item.cut.granule, TILE))
        copies = sum(link.workspace for link in self.recipe.method.links())
        needed = tile * width * (copies * models + 6) + (8 * 6 * item.numel if whole else 0)
        if whole and any(link.decomposed_side == "longer" for link in self.recipe.method.links()):
            needed += 8 * 4 * max(item.site.shape) ** 2
        changes = [each for each in item.inputs if isinstance(each, Change)]
        needed += 3 * width * sum(prod(t.shape) for change in changes for t in change.tensors)
        needed += (
            3 * width * item.numel * sum(not change.low_rank or change.needs_base is not None for change in changes)
        )
        needed += max((each.scratch for each in (*item.inputs, item.base) if isinstance(each, Stored)), default=0)
        if item.form == "factors" and not self.recipe.method.factored:
            needed += 4 * width * item.numel
        return needed

    @property
    def worker_bytes(self) -> int:
        """The memory of one worker, whose buffers fit the largest item, and what lies unused between them."""
        return int(SCATTERED * max((self.working_bytes(item) for item in self.items), default=0))

    def memory(self, workers: int) -> int:
        """The most memory that a merge by so many workers takes, above the imports."""
        return workers * self.worker_bytes + self.kept_bytes + RUN
