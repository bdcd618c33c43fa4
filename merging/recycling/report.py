"""The report of a run: a row for the merge and for everything that it must be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from merging.display.tables import Displayed, Table, Tabular, count_notices
from merging.maths.lazy_torch import Tensor
from merging.recycling.bootstrap import LEVEL, Gap, Metric, paired_bootstrap
from merging.recycling.controls import CONTROLS
from merging.recycling.model import Scores
from merging.recycling.pool_adapters import BASE, FEW_SHOT
from merging.recycling.verdict import Evidence, TransferVerdict, judge

__all__ = ["AVERAGE", "MERGE", "SINGLE", "Measurement", "Report", "Row", "make_report"]

MERGE, SINGLE, AVERAGE = "the merge", "best single adapter", "simple average"


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """The scores of one row on the same examples, with its title and a note."""

    title: str
    scores: Scores
    note: str = ""

    def values(self, metric: Metric) -> Tensor:
        """Return the value of each example. Better values are larger."""
        return self.scores.right if metric == "accuracy" else -self.scores.losses


@dataclass(frozen=True, slots=True, repr=False)
class Row(Displayed):
    """A line of the report: mean loss and accuracy, and the lead of the merge (None for the merge itself)."""

    title: str
    note: str
    loss: float
    accuracy: float
    ahead: Gap | None


@dataclass(frozen=True, slots=True, repr=False)
class Report(Tabular):
    """The results of a run.

    Attributes:
        rows: The rows of the table, the merge among them.
        verdict: The verdict on transfer.
        metric: The measure by which rows are compared.
        tested: Whether the rows were measured on test examples, or on the validation examples.
        examples: The number of examples of each part.
        facts: All other figures, for JSON.
        notices: Remarks on the run.
    """

    rows: tuple[Row, ...]
    verdict: TransferVerdict
    metric: Metric
    tested: bool
    examples: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def _display_table(self) -> Table:
        header, *rows = self.table()
        measured = "test" if self.tested else "validation"
        title = f"Report on the {measured} examples: {'transfer' if self.verdict.transfer else 'no transfer shown'}"
        return Table(title, header, rows=rows, notes=[self.verdict.sentence, *count_notices(self.notices)])

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        values = {
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
        plain: dict[str, Any] = _plain(values)
        return plain

    def table(self) -> list[tuple[str, ...]]:
        """Return the rows as they are printed, after a line of headings."""
        ahead = f"merge ahead by ({LEVEL:.0%} interval)"
        return [("", "accuracy", "loss", ahead, ""), *(self._cells(row) for row in self.rows)]

    def _cells(self, row: Row) -> tuple[str, ...]:
        ahead = row.ahead.text(self.metric) if row.ahead else ""
        return row.title, f"{100 * row.accuracy:.1f}", f"{row.loss:.3f}", ahead, row.note


def _plain(value: Any) -> Any:
    """Return the same with None for infinities and NaN, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def make_report(
    measured: Sequence[Measurement],
    *,
    metric: Metric,
    tested: bool,
    fallback: str | None,
    examples: Mapping[str, int],
    resamples: int,
    seed: int,
    facts: Mapping[str, Any],
    notices: Sequence[str],
) -> Report:
    """Return the report of all measurements.

    Args:
        measured: The rows: the merge, the base, the few-shot LoRA, the baselines, and all controls.
        metric: The measure by which rows are compared.
        tested: Whether the rows were measured on test examples.
        fallback: The baseline that replaced the tuned merge, if one did.
        examples: The number of examples of each part.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
        facts: All other figures, for JSON.
        notices: Remarks on the run.
    """
    merge = next(each for each in measured if each.title == MERGE)
    gaps = {
        each.title: paired_bootstrap(merge.values(metric), each.values(metric), resamples, seed)
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
    return Report(
        rows=tuple(rows),
        verdict=judge(evidence, metric),
        metric=metric,
        tested=tested,
        examples=examples,
        facts=facts,
        notices=tuple(notices),
    )
