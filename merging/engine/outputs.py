"""Writing merged tensors in the form of the output: values, values on top of the base, or factors."""

from __future__ import annotations

from math import isfinite, prod
from time import perf_counter
from typing import Protocol

from merging.engine.tiles import Tiler
from merging.engine.unit import Span, row_blocks
from merging.errors import InputError, option
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import balance_terms, compress_matrix, truncate
from merging.maths.parameters import Coefficient
from merging.plan.items import Item
from merging.sources.changes import Change
from merging.sources.dtypes import DTYPES
from merging.sources.gguf.layout import to_head_rows
from merging.sources.stored import Stored
from merging.sources.stored_bytes import StoredBytes
from merging.storage.output_tensor import OutputTensor

__all__ = ["Output", "Sink", "as_matrices"]


class Sink(Protocol):
    """The receiver of merged tensors."""

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take the elements ``values`` (one axis, on the CPU) of a tensor, from position ``start`` on."""


class Output:
    """Writes merged items to a sink, with the buffers of one worker.

    ``discarded`` receives the share of energy that a lower rank cuts off, by tensor; ``notices`` remarks for people.
    ``seconds`` is the time that the sink took.
    """

    def __init__(self, sink: Sink, tiler: Tiler, discarded: dict[str, float], notices: set[str]) -> None:
        self.sink, self.tiler, self.plan = sink, tiler, tiler.plan
        self.discarded, self.notices = discarded, notices
        self.seconds = 0.0

    def write_whole(self, item: Item, merged: Delta, factor: Coefficient, change: bool) -> None:
        """Write a whole merged tensor, or with ``change`` a merged change, times a factor."""
        merged = merged.scaled(factor) if factor != 1 else merged
        if item.form == "factors":
            if isinstance(merged, LowRank):
                self.write_factors(item, merged)
            else:
                self.write_compressed(item, merged.dense())
            return
        columns = prod(item.site.shape[1:])
        for first, _, block in row_blocks(merged, self.tiler.device):
            self.write_block(item, block, first * columns, change)

    def write_block(self, item: Item, block: Delta, start: int, change: bool) -> None:
        """Write rows of a merged tensor, or with ``change`` of a merged change, from a flat offset on."""
        values = block.dense()
        if change and item.form == "dense" and item.base is not None:
            values = values + self.tiler.raw(item.base, start, values.numel()).view(values.shape)
        self.write(item.outs[0], values, start)

    def write_compressed(self, item: Item, full: Tensor) -> None:
        """Write a merged change that is there in full as the best factors of the output's rank."""
        matrices, transposed = as_matrices(item, full)
        factors, discarded = compress_matrix(matrices, self._rank_of(item), item.site.shape, transposed)
        self.discarded[item.site.name] = discarded
        self.write_factors(item, factors)

    def write_factors(self, item: Item, merged: LowRank) -> None:
        """Write factors of exactly the output's rank: truncated to it, or padded with zeros up to it."""
        rank = self._rank_of(item)
        if merged.rank > rank:
            merged, discarded = truncate(merged, rank)
            self.discarded[item.site.name] = discarded
        if item.outs[0].dtype_name == "F16":
            merged = balance_terms(merged, merged.up.dtype)
        missing = rank - merged.rank
        down = torch.nn.functional.pad(merged.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(merged.up, (0, missing))
        if item.written != 1:
            up = up * item.written
        if item.placings:
            self._place_factors(item, down, up)
            return
        if up.dim() > 2:
            up = up.permute(1, 2, 0)  # PEFT keeps the rows of down by expert and rank, and the columns of up by rank
        for out, values in zip(item.outs, (down, up), strict=True):
            self.write(out, values)

    def write_leading(self, item: Item, factors: LowRank) -> None:
        """Write the leading directions of a decomposed change, up to the rank of the output."""
        rank = self._rank_of(item)
        leading = LowRank(factors.up[..., :rank], factors.down[..., :rank, :], factors.shape, factors.transposed)
        self.write_factors(item, leading)

    def _rank_of(self, item: Item) -> int:
        """Return the rank of an item's factors in the output."""
        return self.plan.ranks.get(item.site.name, self.plan.rank)

    def _place_factors(self, item: Item, down: Tensor, up: Tensor) -> None:
        for each in item.placings:
            lower, upper = (down, up) if each.expert is None else (down[each.expert], up[each.expert])
            zeros = (each.term, each.width - each.term - len(lower))
            if each.down:
                self.write(each.down, lower.mT if each.turned else lower, each.first_down * lower.shape[1])
            rows = to_head_rows(upper[each.rows], each.heads) if each.heads else upper[each.rows]
            self.write(each.up, torch.nn.functional.pad(rows, zeros), each.first * each.width)

    def write_sum(
        self, out: OutputTensor, change: Tensor, base: Tensor | None, factor: Coefficient, start: int
    ) -> None:
        """Write the base plus a change times a factor, from a flat offset on; without a base the product."""
        flat = self.tiler.encode_sum(change, base, float(factor), DTYPES[out.dtype_name])
        if flat is not None:
            self._hand_over(out, flat, start)
            return
        if base is not None:
            change = base.to(change.dtype).add_(change, alpha=float(factor))
        elif factor != 1:
            change = change * factor
        self.write(out, change, start)

    def write(self, out: OutputTensor, values: Tensor, start: int = 0) -> None:
        """Write values of an output tensor from a flat offset on, cast to its type.

        Raises :class:`~merging.errors.InputError` for values beyond the range of the type, unless the recipe allows
        them.
        """
        flat = self.tiler.outgoing(values, DTYPES[out.dtype_name])
        if not self.plan.recipe.allow_nonfinite and _is_doubtful(values, out) and not bool(flat.isfinite().all()):
            kind = out.dtype_name
            if kind in ("F32", "F64"):
                raise InputError(f"{out.name}: the merged values are NaN or infinite, or beyond the range of {kind}")
            raise InputError(
                f"{out.name}: the merged values are beyond the range of {kind}: set a wider {option('dtype')}, as "
                f"float32"
            )
        self._hand_over(out, flat, start)

    def _hand_over(self, out: OutputTensor, flat: Tensor, start: int) -> None:
        began = perf_counter()
        self.sink.write(out.name, flat, start)
        self.seconds += perf_counter() - began

    def copy(self, span: Span) -> None:
        """Write the base's values as they are, and note other models' integers that differ from them."""
        item, (out,) = span.item, span.item.outs
        assert item.base is not None
        size = span.stop - span.start
        values = self.tiler.raw(item.base, span.start, size)
        if isinstance(item.base, StoredBytes):
            self.tiler.check_bytes(item, item.base, values)
            self.sink.write(out.name, values.cpu(), span.start)
            return
        if item.base.floating and out.dtype_name == item.base.dtype_name and values.device.type == "cpu":
            self.tiler.check_finite(item, values)
            self.sink.write(out.name, values, span.start)
            return
        self.write(out, values, span.start)
        if item.base.floating:
            return
        values = values.clone()
        for slot, stored in enumerate(item.inputs):
            if not isinstance(stored, Stored) or stored.dtype != values.dtype:
                continue
            if not torch.equal(values, self.tiler.raw(stored, span.start, size)):
                path = self.plan.models[slot].path
                self.notices.add(f"{item.site.name} of {path} differs, and integers are not merged: kept the base's")


def as_matrices(item: Item, full: Tensor) -> tuple[Tensor, bool]:
    """Return a whole change as matrices ``[..., out, in]``, and whether these are transposed from how it is stored."""
    shape = item.site.shape
    changes = [each for each in item.inputs if isinstance(each, Change)]
    transposed = any(each.is_transposed(shape) for each in changes)
    matrices = full if any(each.kind == "experts" for each in changes) else full.reshape(shape[0], -1)
    return (matrices.mT if transposed else matrices), transposed


def _is_doubtful(values: Tensor, out: OutputTensor) -> bool:
    """Return whether values may have left the range of their type; mostly one sum shows that they have not."""
    narrowed = out.dtype_name == "F16" or (values.dtype == torch.float64 and out.dtype_name != "F64")
    return narrowed or (values.is_floating_point() and not isfinite(float(values.sum())))
