"""The audit of one adapter, cheap checks first: its listing, its config and headers, then its values.

Every check gives findings. A finding that rejects ends the audit before more expensive checks, and the figures that
were computed until then are kept. The order and the limits follow a catalog of defects in public adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from merging.engine.download import download_model
from merging.errors import MergingError, either, option
from merging.hub.cards import stated_licence
from merging.hub.client import Unreachable
from merging.hub.open_model import open_model
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import torch
from merging.maths.linalg import factored_svd, squared_norm
from merging.maths.sums import safe_ratio
from merging.plan.checks import same_base
from merging.plan.names.resolve import Resolver
from merging.pool.entry import VERDICTS, Entry, Finding, PoolVerdict
from merging.pool.sketches import empty, sketch
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.small_files import is_there
from merging.sources.stored import Stored

__all__ = ["KEPT_FILES", "Audit", "Auditor", "Candidate", "change_of"]

KEPT_FILES = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")
"""The files of an adapter that are kept in addition to its weights and config."""

_NOISE = 1e-7
"""The smallest norm of a change, relative to the base's. Rounding alone changes more."""

_LARGEST = 1.0
"""The largest change of a module, relative to its own norm. A larger one is no fine-tune any more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may come into the pool: a path or address, and the facts of its listing."""

    name: str
    owner: str | None = None
    created: str | None = None
    downloads: int = 0
    gated: bool = False


@dataclass(slots=True)
class Audit:
    """The findings about an adapter so far."""

    entry: Entry
    findings: list[Finding] = field(default_factory=list)
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.entry.name

    def find(self, stage: str, verdict: PoolVerdict, reason: str) -> None:
        self.findings.append(Finding(stage, verdict, reason))

    @property
    def rejected(self) -> bool:
        return any(finding.verdict == "rejected" for finding in self.findings)


class Auditor:
    """The auditor of adapters of one base. It keeps the norms of the base's tensors, which are expensive."""

    def __init__(self, base: Checkpoint, base_names: tuple[str, ...], norms: dict[str, float]) -> None:
        self.base = base
        self.base_names = base_names
        self.norms = norms
        self._resolver = Resolver(base.tensors, base.config)

    def check_headers(self, candidate: Candidate) -> Audit:
        """Return the audit of an adapter so far: its listing, config and headers. It holds the opened adapter, if any.

        Raises :class:`~merging.hub.client.Unreachable` if the Hub does not answer, which is not a finding.
        """
        audit = Audit(
            Entry(candidate.name, owner=candidate.owner, created=candidate.created, downloads=candidate.downloads)
        )
        if candidate.gated:
            reason = f"is gated: ask for access on its page, then build with {option('again', True)}"
            audit.find("metadata", "rejected", reason)
        else:
            self._headers(audit)
        return audit

    def check_values(self, audit: Audit) -> Entry:
        """Return the entry of an adapter whose headers are checked, with all findings and figures."""
        if not audit.rejected:
            self._values(audit)
        worst = max((VERDICTS.index(each.verdict) for each in audit.findings), default=0)
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return replace(audit.entry, verdict=VERDICTS[worst], findings=tuple(audit.findings), time=time)

    def _headers(self, audit: Audit) -> None:
        """Check config and headers: a known type, for this base, whose targets all fit it."""
        try:
            adapter = open_model(audit.entry.name)
            if not isinstance(adapter, Adapter):
                audit.find("headers", "rejected", "is a full model, and the pool is for adapters")
                return
            for name in KEPT_FILES:
                is_there(adapter.files[0].parent / name)
            audit.entry = _describe(audit.entry, adapter)
            pickled = next((file.name for file in adapter.files if file.suffix != ".safetensors"), None)
            if pickled:
                audit.find("headers", "rejected", f"is a pickle ({pickled}): only safetensors come into a pool")
            elif adapter.base and not any(same_base(adapter.base, name) for name in self.base_names):
                reason = (
                    f"was trained on {adapter.base}, and the pool is of {self.base_names[0]}: if these are one model, "
                    + either(
                        f"build again with --base-name {adapter.base} --again",
                        f'call add_base_names(["{adapter.base}"]), and build with again=True',
                    )
                )
                audit.find("headers", "rejected", reason)
            else:
                changes = self._resolver.resolve(adapter).changes
                self._repairs(audit, adapter)
                audit.adapter = replace(adapter, changes=changes)
        except Unreachable:
            raise
        except MergingError as error:
            audit.find("headers", "rejected", str(error))

    def _repairs(self, audit: Audit, adapter: Adapter) -> None:
        """Note properties that other programs might misread. They are handled when the adapter is read."""
        for reason in sorted({change.needs_base for change in adapter.changes.values() if change.needs_base}):
            audit.find("headers", "repaired", f"its change is computed with the base: {reason}")
        for notice in adapter.notices:
            audit.find("headers", "repaired", notice)
        if not adapter.base:
            audit.find("headers", "repaired", "names no base: its shapes fit this one's")
        elif adapter.base not in self.base_names:
            audit.find("headers", "repaired", f"names its base {adapter.base}, which is taken for {self.base_names[0]}")
        if adapter.config.get("use_rslora"):
            audit.find("headers", "repaired", "rsLoRA: its scale alpha / sqrt(r) is folded in")

    def _values(self, audit: Audit) -> None:
        """Check the values, one module at a time: finite, not zero, not too large."""
        assert audit.adapter is not None
        download_model(audit.adapter)
        squares: dict[str, float] = {}
        top, total = 0.0, empty()
        try:
            for name, delta in self._changes(audit.adapter):
                if not _finite(delta):
                    audit.find("values", "rejected", f"{name} holds NaN or infinite values")
                    return
                squares[name] = float(squared_norm(delta))
                if isinstance(delta, LowRank) and delta.up.dim() == 2:
                    top = max(top, safe_ratio(float(factored_svd(delta.up, delta.down)[1][0]), self._norm(name)))
                total += sketch(name, delta)
        except MergingError as error:
            audit.find("values", "rejected", str(error))
            return
        norm, weight = math.sqrt(sum(squares.values())), math.hypot(*(self._norm(name) for name in squares))
        relative = {name: safe_ratio(math.sqrt(square), self._norm(name)) for name, square in squares.items()}
        worst = max(relative, key=lambda name: relative[name])
        audit.entry = replace(
            audit.entry,
            norm=norm,
            relative=relative[worst],
            sketch=total.numpy().tobytes(),
            figures={
                "relative_norm": safe_ratio(norm, weight),
                "largest_change_at": worst,
                "top_singular_value": top,
                "unchanged_targets": sum(square == 0 for square in squares.values()),
            },
        )
        if norm <= _NOISE * weight:
            audit.find("values", "quarantined", "changes nothing: its factors are zero, or below rounding")
        if relative[worst] > _LARGEST:
            reason = f"changes {worst} by {relative[worst]:.1f} times its norm: destroyed, or its alpha is wrong"
            audit.find("values", "quarantined", reason)

    def _changes(self, adapter: Adapter) -> Iterator[tuple[str, Delta]]:
        for name, change in adapter.changes.items():
            yield name, change_of(change, self.base.tensors[name])

    def _norm(self, name: str) -> float:
        """Return the Frobenius norm of one of the base's tensors, read in pieces."""
        if name not in self.norms:
            stored, total = self.base.tensors[name], 0.0
            for start in range(0, stored.numel, 1 << 22):
                buffer = torch.empty(min(1 << 22, stored.numel - start), dtype=stored.dtype)
                stored.read_into(buffer, start)
                total += float(buffer.double().square().sum())
            self.norms[name] = math.sqrt(total)
        return self.norms[name]


def change_of(change: Change, stored: Stored) -> Delta:
    """Return an adapter's change of a tensor of the base, in float32."""
    return change.read(stored.shape, lambda: stored.read().float(), torch.float32)


def _describe(entry: Entry, adapter: Adapter) -> Entry:
    origin, changes = adapter.origin, adapter.changes.values()
    return replace(
        entry,
        owner=entry.owner or (origin.repo.partition("/")[0] if origin and not origin.in_store else None),
        licence=origin.licence if origin else stated_licence(adapter.files[0].parent / "README.md"),
        stated_base=adapter.base,
        kind=adapter.dialect,
        rank=max((change.rank for change in changes), default=0),
        targets=len(changes),
        size=sum(stored.nbytes for change in changes for stored in change.tensors),
    )


def _finite(delta: Delta) -> bool:
    parts = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta.value,)
    return all(bool(part.isfinite().all()) for part in parts)
