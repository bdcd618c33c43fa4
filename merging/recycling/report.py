"""What a run found: a row for the merge and for everything that it must be held against, always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

from merging.recycling.bootstrap import LEVEL, Gap, Metric, paired
from merging.recycling.controls import CONTROLS
from merging.recycling.experts import BASE, FEW_SHOT
from merging.recycling.model import Scores
from merging.recycling.verdict import Evidence, Verdict, judge

__all__ = ["AVERAGE", "MERGE", "SINGLE", "Measured", "Report", "Row", "make_report"]

MERGE, SINGLE, AVERAGE = "the merge", "best single adapter", "simple average"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One thing that was measured: its title, what is to be known of it, and its scores on the same examples."""

    title: str
    scores: Scores
    note: str = ""

    def values(self, metric: Metric) -> Tensor:
        """Of each example, larger for better."""
        return self.scores.right if metric == "accuracy" else -self.scores.losses


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report: mean loss and accuracy, and by how much the merge is ahead of it (None of itself)."""

    title: str
    note: str
    loss: float
    accuracy: float
    ahead: Gap | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run found. ``tested``: the rows are of test examples, not of those the merge was chosen on."""

    rows: tuple[Row, ...]
    verdict: Verdict
    metric: Metric
    tested: bool
    examples: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        told = {
            "verdict": self.verdict.sentence,
            "transfer": self.verdict.transfer,
            "metric": self.metric,
            "measured_on": "test" if self.tested else "validation",
            "interval": LEVEL,
            "examples": dict(self.examples),
            "rows": [asdict(row) for row in self.rows],
            **self.facts,
            "notices": list(self.notices),
        }
        plain: dict[str, Any] = _plain(told)
        return plain

    def table(self) -> list[tuple[str, ...]]:
        """The rows as they are printed, after a line of headings."""
        ahead = f"merge ahead by ({LEVEL:.0%} interval)"
        return [("", "accuracy", "loss", ahead, ""), *(self._cells(row) for row in self.rows)]

    def _cells(self, row: Row) -> tuple[str, ...]:
        ahead = row.ahead.shown(self.metric) if row.ahead else ""
        return row.title, f"{100 * row.accuracy:.1f}", f"{row.loss:.3f}", ahead, row.note


def _plain(value: Any) -> Any:
    """The same with None for what is no number, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def make_report(
    measured: Sequence[Measured],
    metric: Metric,
    tested: bool,
    fallback: str | None,
    examples: Mapping[str, int],
    resamples: int,
    seed: int,
    facts: Mapping[str, Any],
    notices: Sequence[str],
) -> Report:
    """The report of what was measured: the rows named in this module, the few-shot LoRA's and the controls' included.

    ``fallback`` names what came back instead of the tuned merge, if something did.
    """
    merge = next(each for each in measured if each.title == MERGE)
    gaps = {
        each.title: paired(merge.values(metric), each.values(metric), resamples, seed)
        for each in measured
        if each is not merge
    }
    evidence = Evidence(
        base=gaps[BASE],
        few_shot=gaps[FEW_SHOT],
        single=gaps[SINGLE],
        average=gaps[AVERAGE],
        controls={name: gaps[control.title] for name, control in CONTROLS.items()},
        tested=tested,
        fallback=fallback,
    )
    rows = [Row(e.title, e.note, e.scores.loss, e.scores.accuracy, gaps.get(e.title)) for e in measured]
    return Report(tuple(rows), judge(evidence, metric), metric, tested, examples, facts, tuple(notices))
