"""Inner products of all pairs of models, computed on their factors or by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from typing_extensions import Unpack

from merging.display.progress import Progress, resolve_progress
from merging.engine.tiles import Tiler
from merging.errors import InputError, OptionError, option
from merging.geometry.alignment import MEMORY, AlignOptions, ModelLike, align, factored, matrix_sides, row_blocks
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.products import row_products
from merging.maths.sums import spans
from merging.methods.families.spherical import cosines as normalised
from merging.plan import Item, Plan
from merging.plan.items import TILE
from merging.sources.changes import Change

__all__ = ["cosines", "gram", "groups_of", "module_grams", "segment_sums"]

_DOUBLE = 1 << 33
"""The most multiplications of factors that are done in float64."""

_ROWS = 1 << 25
"""The most bytes of a block of products of factors. Two blocks are held at a time."""


def gram(
    models: Sequence[ModelLike],
    *,
    max_memory: int = MEMORY,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
    **options: Unpack[AlignOptions],
) -> Tensor:
    """Return the inner products of the models' changes over all tensors.

    For adapters only the factors are used: ``<B_1 A_1, B_2 A_2>`` is the sum of the entries of
    ``(B_1^T B_2) * (A_1 A_2^T)``. One product of the stacked factors gives all pairs of a tensor, in blocks. If ranks
    are so high that products of rows are cheaper, rows are built in blocks, as for full checkpoints. A tensor that a
    model does not change is a zero change.

    Products are float64 where they are cheap. Where there are very many they are float32, with an error of about 1e-6
    of the norms. Sums are float64.

    Args:
        models: The models: paths, addresses, or opened models.
        max_memory: Bytes, above the memory of the imports and of the models' headers.
        device: The device that computes.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Returns:
        The inner products, ``[n, n]`` float64.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together.
    """
    progress = resolve_progress(progress, "comparing")
    plan = align(models, **options)
    total = torch.zeros(len(plan.models), len(plan.models), dtype=torch.float64)
    done, whole = 0, plan.read_bytes
    for item, products in module_grams(plan, max_memory, torch.device(device)):
        total += products
        done += item.read_bytes
        if progress:
            progress(done, whole)
    return total


def cosines(models: Sequence[ModelLike], **options: Unpack[AlignOptions]) -> Tensor:
    """Return the cosines between the models' changes, ``[n, n]`` float64. Takes the options of :func:`gram`.

    The cosine of a zero change to any change, itself included, is 0.
    """
    return normalised(gram(models, **options))[1]


def module_grams(
    plan: Plan, max_memory: int = MEMORY, device: torch.device | str = "cpu"
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item of an aligned plan with its inner products, ``[n, n]`` float64 on the CPU.

    Raises :class:`~merging.errors.InputError` for values that are not finite or whose squares overflow, and
    :class:`~merging.errors.OptionError` if ``max_memory`` does not hold two changes of a tensor.
    """
    for item in plan.items:
        products = _products(plan, item, max_memory, torch.device(device))
        finite = products.diagonal().isfinite()
        if not bool(finite.all()):
            path = plan.models[int((~finite).nonzero()[0])].path
            raise InputError(
                f"{path}: {item.site.name} holds NaN, infinite values, or values whose squares overflow float32: "
                f"repair this model or leave it out"
            )
        # The squared norm of factors that cancel is a rounding error, which may be negative.
        products.diagonal().clamp_(min=0)
        yield item, products


def _products(plan: Plan, item: Item, max_memory: int, device: torch.device) -> Tensor:
    """Return the inner products of one item, by groups of models. Two groups are held at a time."""
    by_factors = factored(item) and _factors_are_cheaper(item)
    groups = groups_of(plan, item, by_factors, max_memory)
    out = torch.zeros(len(plan.models), len(plan.models), dtype=torch.float64)
    for position, group in enumerate(groups):
        others = groups[position:]
        if by_factors:
            blocks = _by_factors(Tiler(plan, device), item, group, others, _block_bytes(max_memory))
        else:
            blocks = (_by_rows(plan, item, group, other, device) for other in others)
        rows = torch.tensor(group)[:, None]
        for other, block in zip(others, blocks, strict=True):
            columns = torch.tensor(other)
            out[rows, columns] = block
            out[columns[:, None], rows[:, 0]] = block.mT
    return out


def _by_factors(
    tiler: Tiler, item: Item, group: list[int], others: list[list[int]], block_bytes: int
) -> Iterator[Tensor]:
    """Yield the inner products of a group of models with each of the other groups, ``[group, other]``."""
    held = _StackedFactors.of(tiler, item, group)
    for other in others:
        yield held.products(held if other is group else _StackedFactors.of(tiler, item, other), block_bytes)


def _changes(item: Item) -> list[Change]:
    return [each for each in item.inputs if isinstance(each, Change)]


def _factors_are_cheaper(item: Item) -> bool:
    """Whether products of factors take fewer multiplications than building rows and multiplying them."""
    _, rows, columns = matrix_sides(item)
    total, models = sum(each.rank for each in _changes(item)), len(_changes(item))
    return total**2 * (rows + columns) <= (models**2 + 2 * total) * rows * columns


def _factor_dtype(plan: Plan, item: Item) -> torch.dtype:
    """Return float64 if there are few products of factors, else the plan's dtype."""
    count, rows, columns = matrix_sides(item)
    total = sum(each.rank for each in _changes(item))
    return torch.float64 if count * total**2 * (rows + columns) <= _DOUBLE else item.dtype


def groups_of(plan: Plan, item: Item, by_factors: bool, max_memory: int) -> list[list[int]]:
    """Return the models that change an item: one group if it fits into memory, else groups that fit in pairs."""
    itemsize = (_factor_dtype(plan, item) if by_factors else item.dtype).itemsize
    there = [slot for slot, each in enumerate(item.inputs) if each is not None]
    sizes = {slot: itemsize * _elements_of(item, slot, by_factors) for slot in there}
    largest, models = max(sizes.values()), len(plan.models)
    # Reading a change takes twice its size more for a moment, and there are a few matrices of all pairs.
    room = max_memory - 2 * largest - 4 * 8 * models**2 - (2 * _block_bytes(max_memory) if by_factors else 0)
    if sum(sizes.values()) <= room:
        return [list(sizes)]
    if 2 * largest > room:
        needed = max_memory - room + 2 * largest
        raise OptionError(
            f"{item.site.name} takes {ceil(needed / 1e6)} MB to compare: raise {option('max_memory')} to that"
        )
    groups: list[list[int]] = [[]]
    taken = 0
    for slot, size in sizes.items():
        if taken + size > room // 2:
            groups, taken = [*groups, []], 0
        groups[-1].append(slot)
        taken += size
    return groups


def _block_bytes(max_memory: int) -> int:
    return min(_ROWS, max_memory // 8)


def _elements_of(item: Item, slot: int, by_factors: bool) -> int:
    """Return the numbers in memory for one model's change while it is multiplied."""
    count, rows, columns = matrix_sides(item)
    each = item.inputs[slot]
    low = each.rank * (rows + columns) if isinstance(each, Change) and each.low_rank else None
    if by_factors:
        return count * (low or 0)
    whole = low if low is not None else rows * columns if isinstance(each, Change) else 0
    # A block of rows exists twice: as it was read, and in the spans that are multiplied.
    block = min(rows * columns, max(TILE, 64 * columns))
    return count * (whole + 3 * block)


@dataclass(slots=True)
class _StackedFactors:
    """The stacked factors of some models' changes of one tensor.

    Attributes:
        ups: The upper factors, transposed, ``[batch, R, out]``.
        downs: The lower factors, ``[batch, R, in]``.
        owners: The number of the model to which each row belongs, ``[R]``.
        starts: The first row of each model, and ``R``.
    """

    ups: Tensor
    downs: Tensor
    owners: Tensor
    starts: list[int]

    @classmethod
    def of(cls, tiler: Tiler, item: Item, slots: Sequence[int]) -> _StackedFactors:
        """Read the factors, one model at a time."""
        dtype = _factor_dtype(tiler.plan, item)
        ranks = [each.rank for slot in slots if isinstance(each := item.inputs[slot], Change)]
        starts = [sum(ranks[:position]) for position in range(len(ranks) + 1)]
        transposed: bool | None = None
        for start, slot in zip(starts, slots, strict=False):
            delta = tiler.change(item, slot)
            assert isinstance(delta, LowRank)
            if transposed is None:
                transposed = delta.transposed
                batch = delta.up.shape[:-2].numel()
                ups = delta.up.new_zeros(batch, starts[-1], delta.up.shape[-2], dtype=dtype)
                downs = delta.up.new_zeros(batch, starts[-1], delta.down.shape[-1], dtype=dtype)
            delta = delta.oriented(transposed)
            ups[:, start : start + delta.rank] = delta.up.mT
            downs[:, start : start + delta.rank] = delta.down
        owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        return cls(ups, downs, owners.to(ups.device), starts)

    def products(self, other: _StackedFactors, block_bytes: int) -> Tensor:
        """Return the inner products with other changes (or with themselves), ``[models, others]`` float64."""
        out = torch.zeros(len(self.starts) - 1, len(other.starts) - 1, dtype=torch.float64)
        width = self.ups.itemsize * max(1, other.starts[-1])
        for first, last in self._blocks(block_bytes // width):
            # Within one group, the pairs below the diagonal follow by symmetry.
            after = first if other is self else 0
            block = self._block(other, first, last, after)
            out[first:last, after:] = block
        return out.triu() + out.triu(1).mT if other is self else out

    def _blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of consecutive models with at most ``rows`` rows, or a single model."""
        first = 0
        for last in range(1, len(self.starts)):
            if last == len(self.starts) - 1 or self.starts[last + 1] - self.starts[first] > rows:
                yield first, last
                first = last

    def _block(self, other: _StackedFactors, first: int, last: int, after: int) -> Tensor:
        mine, theirs = slice(self.starts[first], self.starts[last]), slice(other.starts[after], None)
        owners, others = self.owners[mine] - first, other.owners[theirs] - after
        total = torch.zeros(last - first, len(other.starts) - 1 - after, dtype=torch.float64)
        for up, down, other_up, other_down in zip(self.ups, self.downs, other.ups, other.downs, strict=True):
            # The others come first, so that whole rows are added up below.
            terms = row_products(other_up[theirs], up[mine])
            terms *= row_products(other_down[theirs], down[mine])
            sums = segment_sums(terms, others, len(other.starts) - 1 - after)
            total += segment_sums(sums.mT.double(), owners, last - first).cpu()
        return total


def segment_sums(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return the sums of the rows ``[k, ...]`` with the same owner, ``[count, ...]``."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, owners, values)


def _by_rows(plan: Plan, item: Item, group: list[int], other: list[int], device: torch.device) -> Tensor:
    """Return inner products ``[group, other]`` by blocks of rows, over spans so short that float32 loses nothing."""
    same = group is other
    out = torch.zeros(len(group), len(other), dtype=torch.float64)
    for block in row_blocks(plan, item, group if same else [*group, *other], device):
        for piece in spans(block):
            pieces = piece if piece.dim() == 3 else piece[:, None]
            mine = pieces[: len(group)].transpose(0, 1)
            theirs = mine if same else pieces[len(group) :].transpose(0, 1)
            out += (mine @ theirs.mT).sum(0, dtype=torch.float64).cpu()
    return out
