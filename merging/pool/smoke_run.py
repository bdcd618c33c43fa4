"""The smoke test of a whole pool: every adapter once, noted when it is done, with limits that the pool keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from merging.cluster import RayCluster
from merging.engine.evaluation import evaluate_each
from merging.errors import FormatError, MergingError, OptionError
from merging.hub.open_model import open_model
from merging.plan.names.resolve import Resolver
from merging.pool.entry import Entry, Finding
from merging.pool.index import Index
from merging.pool.smoke import TEXTS, Limits, SmokeTest
from merging.sources import Adapter, Checkpoint
from merging.sources.small_files import parse_json

if TYPE_CHECKING:
    from merging.pool.pool import Pool

__all__ = ["smoke", "smoke_limits"]


def smoke_limits(index: Index) -> Limits:
    """Return the limits that were given to a pool last, or the defaults."""
    where = f"{index.path}: its limits of the smoke test"
    try:
        return Limits(**parse_json(index.fact("smoke_limits") or "{}", where))
    except (TypeError, OptionError) as error:
        raise FormatError(f"{where}: {error}") from None


def smoke(
    pool: Pool,
    base: Checkpoint,
    *,
    texts: Sequence[str] | None,
    limits: Limits | None,
    device: str,
    again: bool,
    cluster: RayCluster | None,
    on_event: Callable[[Entry], None] | None,
) -> None:
    """Run the base with each adapter of a pool that was not tested before; see :meth:`~merging.pool.Pool.smoke`."""
    index = pool.index
    if limits is not None:
        _judge(index, limits, on_event)
    kept = [entry for entry in index.entries() if entry.folder and (again or not entry.smoke_tested)]
    waiting = [entry for entry in kept if entry.usable or entry.smoke_tested]
    if not waiting:
        return
    prepare = partial(_prepare, pool.base, base, texts or TEXTS, device, smoke_limits(index))
    resolver = Resolver(base.tensors, base.config)
    tasks = ((entry, _open(entry, pool, resolver)) for entry in waiting)
    with closing(evaluate_each(tasks, prepare, cluster, models=[pool.base])) as results:
        for entry, (findings, figures) in results:
            index.note_findings(entry.name, "smoke", findings, {"smoked": 1.0, **figures})
            if on_event:
                on_event(index.entry(entry.name))


def _open(entry: Entry, pool: Pool, resolver: Resolver) -> Adapter | MergingError:
    """Return the adapter of an entry, or the error that keeps it from being opened."""
    try:
        adapter = open_model(entry.place(pool.path))
        assert isinstance(adapter, Adapter)
        return replace(adapter, changes=resolver.resolve(adapter).changes)
    except MergingError as error:
        return error


def _prepare(
    base: str, source: Checkpoint, texts: Sequence[str], device: str, limits: Limits
) -> Callable[[Adapter | MergingError], tuple[list[Finding], dict[str, float]]]:
    """Return the function that tests one adapter."""
    return partial(_test, SmokeTest(base, source, texts, device, limits))


def _test(test: SmokeTest, adapter: Adapter | MergingError) -> tuple[list[Finding], dict[str, float]]:
    """Return findings and figures of an adapter; one that cannot be run has a finding that says so."""
    try:
        if isinstance(adapter, MergingError):
            raise adapter
        return test.run(adapter)
    except MergingError as error:
        return [Finding("smoke", "ok", f"could not be run: {error}")], {}


def _judge(index: Index, limits: Limits, on_event: Callable[[Entry], None] | None) -> None:
    """Store limits, and apply them to the figures of earlier tests."""
    index.note(smoke_limits=json.dumps(asdict(limits)))
    for entry in index.entries():
        if entry.smoke_tested and {"output_change", "spread_ratio"} <= entry.figures.keys():
            index.note_findings(entry.name, "smoke", limits.findings(entry.figures), {})
            if on_event and index.entry(entry.name).verdict != entry.verdict:
                on_event(index.entry(entry.name))
