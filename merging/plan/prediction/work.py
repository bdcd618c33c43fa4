"""The work of a merge, counted from headers: bytes, sweeps, elements, and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from merging.maths.fast_svd import LARGE
from merging.maths.site import Site
from merging.methods.contract.method import Method
from merging.plan.items import CHUNK, Item
from merging.plan.merge_plan import Plan
from merging.plan.stages import all_stages
from merging.sources.stored import Stored

__all__ = ["ItemWork", "count_sweeps", "count_work", "gram_flops"]

EIGEN = 9
"""Operations of an eigenvalue problem with vectors of a symmetric matrix, for each n^3."""

FAST = 0.3
"""Share of the time of exact decompositions that fast ones of large matrices take (measured: 0.2 to 0.5)."""

CORE = 13
"""Operations of an SVD of a small core, for each rank^3."""

RANGE_PRODUCTS = 6
"""Products with a full matrix of a randomised range finder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemWork:
    """The work of one item, over all its sweeps.

    Attributes:
        method: the names of the methods that merge it, outermost first.
        sweeps: the number of times that it is gone through.
        units: the number of units that workers may take apart.
        read_bytes: the bytes of its inputs.
        written_bytes: the bytes of its output.
        elements: the elements of all inputs that are merged, over all sweeps.
        product_flops: operations of low-rank factors that are multiplied out.
        decomposition_flops: operations of decompositions of full matrices.
        core_flops: operations of decompositions of factors.
        compression_flops: operations of decompositions that turn a full change into factors.
    """

    method: tuple[str, ...]
    sweeps: int
    units: int
    read_bytes: int
    written_bytes: int
    elements: int = 0
    product_flops: float = 0.0
    decomposition_flops: float = 0.0
    core_flops: float = 0.0
    compression_flops: float = 0.0


def count_sweeps(method: Method, models: int) -> int:
    """Return the number of sweeps over the whole model: the merge, and sweeps for statistics over the model."""
    statistics = [each for each in method.required_statistics() if each.per == "model"]
    results = method.result_statistics(models)
    return (
        1
        + sum(each.reduction.sweeps for each in statistics)
        + max((each.reduction.sweeps for each in results), default=0)
    )


def count_work(plan: Plan) -> list[ItemWork]:
    """Return the work of every item of a plan and of its stages."""
    every = [(stage.plan, stage.lazy) for stage in all_stages(plan.stages)]
    outer = count_sweeps(plan.recipe.method, len(plan.models))
    found: list[ItemWork] = []
    for each, lazy in [*every, (plan, False)]:
        for work in _count_plan(each):
            found += [work] * (outer if lazy else 1)  # computed again in every sweep of the plan
    return found


def _count_plan(plan: Plan) -> Iterator[ItemWork]:
    sweeps = count_sweeps(plan.recipe.method, len(plan.models))
    for item in plan.items:
        yield _count_item(item, plan, sweeps)


def _count_item(item: Item, plan: Plan, sweeps: int) -> ItemWork:
    """Return the work of an item; the method goes through the whole model ``sweeps`` times."""
    method = plan.recipe.method
    units = ceil(item.numel / CHUNK) if item.cut.splits else 1
    written = sum(out.nbytes for out in item.outs)
    if item.form == "copy":
        return ItemWork(
            method=("passthrough",), sweeps=1, units=units, read_bytes=item.read_bytes, written_bytes=written
        )
    bound = method.at(item.site)
    factored = item.cut.way == "factors"
    per_tensor = [each for each in bound.required_statistics() if each.per == "tensor"]
    sweeps += sum(each.reduction.widen(item.dtype).sweeps for each in per_tensor)
    full = sum(isinstance(each, Stored) for each in (*item.inputs, item.base))
    factors = item.factor_bytes // item.itemsize
    rank = _joint_rank(item, factors)
    multiplied = not (factored and item.form == "factors") if rank else False
    compressed = item.form == "factors" and not (factored and method.factored)
    return ItemWork(
        method=tuple(link.name for link in bound.links()),
        sweeps=sweeps,
        units=max(1, units),
        read_bytes=item.read_bytes,
        written_bytes=written,
        elements=sweeps * (full * item.numel + factors) + (item.numel if multiplied else 0),
        product_flops=2.0 * item.numel * rank * (1 if factored else sweeps) if multiplied else 0.0,
        decomposition_flops=0.0 if factored else decomposition_flops(item, bound),
        core_flops=_core_flops(item.site, rank, bound) if factored else 0.0,
        compression_flops=_compression_flops(item, plan.ranks.get(item.site.name, plan.rank)) if compressed else 0.0,
    )


def _joint_rank(item: Item, factors: int) -> float:
    """Return the sum of the ranks of all low-rank changes, from the number of elements in their factors."""
    if not item.site.shape or not any(change.low_rank for change in item.changes):
        return 0.0
    return factors / (item.site.shape[0] + prod(item.site.shape[1:]))


def decomposition_flops(item: Item, method: Method) -> float:
    """Return the operations of the decompositions that a method makes of a full tensor."""
    total = 0.0
    for link in method.links():
        if link.decomposed_side is not None and link.grain_at(item.site) == "matrix":
            flops = gram_flops(item.site.shape, link.decomposed_side)
            fast = getattr(link, "svd", "") == "fast" and min(item.site.shape[-2:]) > LARGE
            total += link.decompositions(len(item.inputs)) * flops * (FAST if fast else 1)
    return total


def gram_flops(shape: Sequence[int], side: str) -> float:
    """Return the operations of an SVD of a matrix (or a stack of matrices) by the Gram matrix of one side."""
    *stack, rows, columns = (1, 1, *shape)
    short, long = sorted((rows, columns))
    size, other = (short, long) if side == "shorter" else (long, short)
    return float(prod(stack)) * (4.0 * other * size**2 + EIGEN * float(size) ** 3)


def _compression_flops(item: Item, rank: int) -> float:
    """Return the operations of the randomised range finder that turns a full change into factors."""
    return 2.0 * item.numel * (rank + 8) * RANGE_PRODUCTS


def _core_flops(site: Site, rank: float, method: Method) -> float:
    """Return the operations of joint bases of factors, and of decompositions in them."""
    decomposing = [link for link in method.links() if link.decomposed_side is not None]
    if not decomposing or len(site.shape) < 2:
        return 0.0
    rows, columns = site.shape[0], prod(site.shape[1:])
    problems = sum(link.decompositions(1) for link in decomposing)
    return 4.0 * (rows + columns) * rank**2 + problems * CORE * rank**3
