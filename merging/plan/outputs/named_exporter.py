"""A merged LoRA in the files of other programs than PEFT: by their names, fused or apart as they are there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merging.errors import InputError, option
from merging.maths.shapes import Shapes
from merging.maths.site import Site
from merging.plan.items import Constant, Item, ItemForm, Placing
from merging.plan.names.output_names import Names
from merging.plan.outputs.exporter import Changes, Exporter, is_bias, is_lora
from merging.sources.changes import Change
from merging.sources.computed import ComputedChange
from merging.sources.fused_names import RowRange
from merging.sources.stored import Stored
from merging.storage.output_tensor import OutputTensor

__all__ = ["NamedExporter"]

_CONVOLUTION = re.compile(r"(?:conv\w*|proj_in|proj_out|_op|in_layers_2|out_layers_3|skip_connection)$")
"""Endings of modules that may be convolutions."""


@dataclass(frozen=True, slots=True)
class _Share:
    """Rows of a target, from ``start`` on, that are the rows of an output tensor from ``first`` on."""

    label: str
    first: int
    start: int
    length: int


class NamedExporter(Exporter):
    """Lays out the items of a merged LoRA under their names in its file.

    Where the output fuses what the targets keep apart, their factors stand side by side. Where it keeps apart what they
    fuse, each part has a copy of the lower factor.

    Args:
        names: the names of the file's tensors.
        shapes: the shapes of the base's tensors if the merge is ``based`` on one, else of the targets.
        factored: the shapes of the targets that become factors.
        ranks: the rank of the factors of each.
        dtype_name: the type of every tensor.
        based: whether there is a base.
    """

    def __init__(
        self,
        names: Names,
        shapes: Shapes,
        factored: Shapes,
        *,
        ranks: Mapping[str, int],
        dtype_name: str,
        based: bool,
    ) -> None:
        self.format, self.header = names.format, names.header
        self._names, self._based, self.ranks, self._dtype_name = names, based, ranks, dtype_name
        self._shapes, self._factored = shapes, factored
        self._rows = names.rows
        self._shares: defaultdict[str, list[_Share]] = defaultdict(list)
        for label, rows in self._rows.items():
            first = 0
            for part in rows:
                self._shares[part.name].append(_Share(label, first, part.start, part.length))
                first += part.length
        self._terms: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for name in factored:
            for share in self._shares[name]:
                terms = self._terms[share.label]
                terms.setdefault(name, self._width(share.label))

    def _width(self, label: str) -> int:
        """Return the rank of an output tensor: the sum of the ranks of its targets."""
        return sum(self.ranks[name] for name in self._terms[label])

    def item(self, site: Site, changes: Changes, stored: Stored | None) -> Item:
        """Return the item of a target."""
        shares = self._shares[site.name]
        if site.name not in self._factored:
            form: ItemForm = "delta" if is_bias(changes) or is_lora(changes) else "dense"
            return Item(site, changes, stored, (self._full(site, shares, form),), form)
        self._check(site, [change for change in changes if change])
        placings = tuple(self._placings(site, shares))
        outs = tuple(out for each in placings for out in (each.down, each.up) if out)
        return Item(site, changes, stored, tuple(dict.fromkeys(outs)), "factors", placings=placings)

    def _full(self, site: Site, shares: Sequence[_Share], form: ItemForm) -> OutputTensor:
        """Return the tensor of a change in full, which files have of biases and norms mostly."""
        label, alone = shares[0].label, (RowRange(site.name, 0, (site.shape or (1,))[0]),)
        weight = self._shapes.get(f"{site.name.rpartition('.')[0]}.weight", ())
        name = self._names.in_full(label, weight) if form != "dense" and self._rows[label] == alone else None
        if name is None:
            raise InputError(
                f"{site.name} is changed in full, which LoRA files in the format of {self._names.format} do not hold: "
                f"make a model with {option('kind', 'model')}"
            )
        return OutputTensor(name, self._dtype_name, site.shape)

    def _check(self, site: Site, changes: Sequence[Change]) -> None:
        if any(change.kind in ("embedding", "experts") or change.is_transposed(site.shape) for change in changes):
            raise InputError(
                f"{site.name} is an embedding, or stored transposed, which a LoRA in the format of "
                f"{self._names.format} does not hold: use {option('format', 'peft')}, or {option('kind', 'model')}"
            )
        flattened = all(isinstance(change, ComputedChange) and not change.kernel for change in changes)
        if not self._based and flattened and _CONVOLUTION.search(site.name.rpartition(".")[0]):
            raise InputError(
                f"{site.name} may be a convolution, whose kernel the file does not state: give the model with "
                f"{option('base')}"
            )

    def _placings(self, site: Site, shares: Sequence[_Share]) -> Iterator[Placing]:
        begun: set[str] = set()
        for share in shares:
            lower, upper = self._factors(share.label, site.shape)
            rows = slice(share.start, share.start + share.length)
            again = share.label in begun  # both runs of its rows have one lower factor
            begun.add(share.label)
            yield Placing(None if again else lower, upper, rows, share.first, self._terms[share.label][site.name])

    def _factors(self, label: str, shape: tuple[int, ...]) -> tuple[OutputTensor, OutputTensor]:
        """Return the two factors of an output tensor that is made of targets of this ``shape``, but for their rows."""
        width = self._width(label)
        _, inputs, *kernel = shape
        outputs = sum(part.length for part in self._rows[label])
        down, up = self._names.factors(label)
        return (
            OutputTensor(down, self._dtype_name, (width, inputs, *kernel)),
            OutputTensor(up, self._dtype_name, (outputs, width, *(1 for _ in kernel))),
        )

    def check(self, items: Sequence[Item]) -> None:
        """Accept all items: each was checked on its own."""

    def constants(self) -> tuple[Constant, ...]:
        """Return the alphas, and zeros where the output fuses targets that were not trained."""
        found: list[Constant] = []
        for label, terms in self._terms.items():
            width = self._width(label)
            if alpha := self._names.alpha(label):
                found.append(Constant(OutputTensor(alpha, "F32", ()), float(width)))
            _, upper = self._factors(label, self._factored[next(iter(terms))])
            first = 0
            for part in self._rows[label]:
                if part.name not in terms:
                    found.append(Constant(upper, 0.0, first * width, part.length * width))
                first += part.length
        return tuple(found)
