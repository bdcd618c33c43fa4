"""The ranks of an adapter, chosen from the decomposed changes so that the whole file has the size asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merging.engine.decomposition import Decomposition, resize_plan, settings_of
from merging.engine.run import decompose
from merging.engine.stages import StageSettings
from merging.errors import InputError, option
from merging.output.header import header_metadata
from merging.plan import Plan
from merging.storage.writer import file_size

__all__ = ["open_decomposed"]

_ROUNDS = 20


@contextmanager
def open_decomposed(plan: Plan, settings: StageSettings) -> Iterator[tuple[Plan, Decomposition | None]]:
    """Decompose the changes of a plan whose recipe has conditions on ranks.

    Yields the plan with its ranks and the decomposition, whose factors can be read while the body runs; the same plan
    and None for other plans. Raises :class:`~merging.errors.MergingError` for values that cannot be decomposed.
    """
    if plan.sized is None:
        yield plan, None
        return
    found = decompose(
        plan,
        device=settings.device,
        threads=settings.threads,
        progress=settings.progress,
        scratch=settings.scratch,
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
    budget = size
    for _ in range(_ROUNDS):
        ranks = decomposition.choose_ranks(budget)
        sized = resize_plan(plan, ranks)
        excess = file_size(sized.outs, header_metadata(sized)) - size
        if excess <= 0:
            return sized
        budget = min(budget, decomposition.bytes_of(ranks)) - excess  # less than was used, so that each round differs
        if budget <= 0:
            break
    raise InputError(
        f"{option('size')} is too little: with the tensors that are written in full the file is larger: leave some out "
        f"with {option('exclude')}, or raise it"
    )
