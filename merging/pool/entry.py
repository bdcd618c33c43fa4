"""The records of a pool: an adapter's entry, its findings and its verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from merging.display.tables import Displayed
from merging.sources.links import refuse_link

__all__ = ["OVERRULED", "VERDICTS", "Built", "Entry", "Finding", "PoolVerdict", "verdict_of"]

PoolVerdict = Literal["ok", "repaired", "quarantined", "rejected"]
VERDICTS: tuple[PoolVerdict, ...] = ("ok", "repaired", "quarantined", "rejected")
"""The verdicts from best to worst. An adapter has the worst verdict of its findings."""

OVERRULED = "overruled"
"""The stage of a person's finding, which overrules the others."""


@dataclass(frozen=True, slots=True, repr=False)
class Finding(Displayed):
    """One finding of a check: its stage, the verdict that follows, and the reason."""

    stage: str
    verdict: PoolVerdict
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Entry(Displayed):
    """An adapter of the pool.

    Attributes:
        name: Its address or path.
        verdict: The worst verdict of its findings.
        owner: The user or organization on the Hub, None for a local adapter.
        licence: The license that its card states.
        stated_base: The base that it names.
        created: The time of its creation on the Hub, ISO 8601.
        downloads: The number of downloads on the Hub.
        sha256: The hash of its content, None if its files were not kept.
        folder: The path of its files in the pool, None if they were not kept.
        size: The size of its tensors, in bytes.
        kind: The kind of adapter.
        rank: Its largest rank.
        targets: The number of modules that it changes.
        norm: The Frobenius norm of its change.
        relative: The largest ratio of a module's change to the module (Frobenius norms).
        sketch: Its sketch, float64 as bytes.
        figures: All other figures of audit and smoke test.
        time: The time of the audit, ISO 8601.
        findings: The findings of all checks.
    """

    name: str
    verdict: PoolVerdict = "ok"
    owner: str | None = None
    licence: str | None = None
    stated_base: str | None = None
    created: str | None = None
    downloads: int = 0
    sha256: str | None = None
    folder: str | None = None
    size: int = 0
    kind: str | None = None
    rank: int = 0
    targets: int = 0
    norm: float | None = None
    relative: float | None = None
    sketch: bytes | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    findings: tuple[Finding, ...] = ()

    def _display_fields(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("sketch", "sha256")}

    @property
    def usable(self) -> bool:
        """Whether merges may choose it."""
        return self.verdict in ("ok", "repaired")

    @property
    def smoke_tested(self) -> bool:
        """Whether the base was run with it."""
        return bool(self.figures.get("smoked"))

    smoked = smoke_tested  # its name in version 0.1

    def place(self, pool: Path) -> Path:
        """Return the path of its files. Raises :class:`~merging.errors.FormatError` if any of them is a link."""
        place = pool / str(self.folder)
        for path in (place, place.parent, *(place.iterdir() if place.is_dir() else ())):
            refuse_link(path)
        return place

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON, without the sketch."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sketch"}
        findings = [{"stage": f.stage, "verdict": f.verdict, "reason": f.reason} for f in self.findings]
        return values | {"findings": findings}


def verdict_of(findings: Iterable[Finding]) -> PoolVerdict:
    """Return the worst verdict of all findings.

    If a person overruled an adapter, only the person's finding counts, and findings that leave no files to read: the
    adapter was rejected, or its files are gone.
    """
    findings = list(findings)
    if any(each.stage == OVERRULED for each in findings):
        findings = [each for each in findings if each.stage in (OVERRULED, "files") or each.verdict == "rejected"]
    return VERDICTS[max((VERDICTS.index(each.verdict) for each in findings), default=0)]


@dataclass(frozen=True, slots=True, repr=False)
class Built(Displayed):
    """The result of a build: the number of audited adapters, and the number of adapters in the pool by verdict."""

    audited: int
    verdicts: dict[str, int]
