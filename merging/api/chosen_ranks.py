"""The ranks of an adapter, chosen from the decomposed changes so that the whole file has the size asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from merging.engine.decomposition import Decomposition, resize_plan, settings_of
from merging.engine.measures import Measures
from merging.engine.run import decompose
from merging.engine.stages import StageSettings
from merging.errors import InputError, option
from merging.output.header import header_metadata
from merging.plan import Plan
from merging.storage.writer import file_size

__all__ = ["open_decomposed"]

_ROUNDS = 20


@contextmanager
def open_decomposed(
    plan: Plan, settings: StageSettings, measures: Measures | None = None
) -> Iterator[tuple[Plan, Decomposition | None]]:
    """Decompose the changes of a plan whose recipe has conditions on ranks; ``measures`` receives their measures.

    Yields the plan with its ranks and the decomposition, whose factors can be read while the body runs; the same plan
    and None for other plans. Raises :class:`~merging.errors.MergingError` for values that cannot be decomposed.
    """
    if plan.sized is None:
        yield plan, None
        return
    found = decompose(
        plan,
        devices=settings.devices,
        threads=settings.threads,
        progress=settings.progress,
        scratch=settings.scratch,
        make_crew=settings.make_crew,
        measures=measures,
    )
    try:
        yield _choose_ranks(plan, found), found
    finally:
        found.spool.close()


def _choose_ranks(plan: Plan, decomposition: Decomposition) -> Plan:
    """Return the plan with the ranks that its recipe's conditions mean.

    Raises :class:`~merging.errors.InputError` for a size that is too small for any adapter of the plan.
    """
    size = settings_of(plan).size
    if size is None:
        return resize_plan(plan, decomposition.choose_ranks())
    least, budget = decomposition.least_ranks(), size
    for _ in range(_ROUNDS):
        ranks = decomposition.choose_ranks(budget)
        sized = resize_plan(plan, ranks)
        excess = file_size(sized.outs, header_metadata(sized)) - size
        if excess <= 0:
            return sized
        if ranks == least:
            break
        used = min(budget, decomposition.bytes_of(ranks))
        budget = used - excess if used > excess else used // 2  # less than was used, so that each round differs
    smallest = resize_plan(plan, least)
    needed = file_size(smallest.outs, header_metadata(smallest))
    if needed <= size:
        return smallest
    for _ in range(2):  # the header states the size: a longer number may take more bytes itself
        needed = file_size(smallest.outs, header_metadata(_with_size(smallest, needed)))
    in_full = any(item.form != "factors" for item in smallest.items)
    hint = f", with tensors that are written in full: leave some out with {option('exclude')}" if in_full else ""
    raise InputError(f"{option('size')} is too little: the smallest file has {needed:,} bytes{hint}")


def _with_size(plan: Plan, size: int) -> Plan:
    """Return the plan with another size in its recipe."""
    rank = settings_of(plan).model_copy(update={"size": size})
    return replace(plan, recipe=plan.recipe.model_copy(update={"rank": rank}))
