"""The audits of a build: every new adapter once, noted with its files when it is done."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from merging.cluster import RayCluster
from merging.engine.evaluation import evaluate_each
from merging.pool.audit import Audit, Auditor, Candidate
from merging.pool.entry import OVERRULED, Entry, verdict_of
from merging.pool.files import keep_files
from merging.pool.index import Index
from merging.sources import Checkpoint

if TYPE_CHECKING:
    from merging.pool.pool import Pool

__all__ = ["audit_each"]


def audit_each(
    pool: Pool, base: Checkpoint, candidates: Iterable[Candidate], *, again: bool, cluster: RayCluster | None
) -> Generator[Entry, None, None]:
    """Audit new candidates, and yield each entry when it is in the index; see :meth:`~merging.pool.Pool.build`."""
    index = pool.index
    auditor = Auditor(base, pool.base_names, index.base_norms())
    tasks = ((audit, audit) for audit in _check_headers(auditor, candidates, set() if again else index.names()))
    with closing(evaluate_each(tasks, partial(_prepare, auditor), cluster)) as results:
        for audit, (entry, norms) in results:
            if audit.adapter is not None and entry.verdict != "rejected":
                entry = keep_files(pool.path, entry, audit.adapter)
            entry = _keep_overruling(index, entry)
            index.put(entry, norms)
            yield entry


def _check_headers(auditor: Auditor, candidates: Iterable[Candidate], known: set[str]) -> Iterator[Audit]:
    for candidate in candidates:
        if candidate.name not in known:
            known.add(candidate.name)
            yield auditor.check_headers(candidate)


def _prepare(auditor: Auditor) -> Callable[[Audit], tuple[Entry, dict[str, float]]]:
    """Return the function that ends an audit: it returns the entry, and norms of the base that it had to compute."""

    def check(audit: Audit) -> tuple[Entry, dict[str, float]]:
        before = set(auditor.norms)
        entry = auditor.check_values(audit)
        return entry, {name: auditor.norms[name] for name in auditor.norms.keys() - before}

    return check


def _keep_overruling(index: Index, entry: Entry) -> Entry:
    """Return the entry of a repeated audit with the verdict that a person gave before."""
    if entry.name not in index.names():
        return entry
    kept = [each for each in index.entry(entry.name).findings if each.stage == OVERRULED]
    findings = (*entry.findings, *kept)
    return replace(entry, findings=findings, verdict=verdict_of(findings)) if kept else entry
