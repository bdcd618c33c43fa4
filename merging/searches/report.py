"""The report of a search: every candidate, the winner against the trivial choices, and the optimism of choosing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from merging.display.tables import Displayed, Table, Tabular, count_notices
from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.bootstrap import LEVEL, Gap, paired_bootstrap
from merging.recycling.seeds import generator
from merging.searches.settings import Objective
from merging.searches.spaces import BASE
from merging.searches.trials import Trial, mean_of_tasks, show_score

__all__ = ["WINNER", "ComparedRow", "SearchReport", "TrialRow", "compare_rows", "estimate_optimism"]

WINNER = "the winner"

_DRAWS = 1000
"""Resamples by which the optimism is estimated."""


@dataclass(frozen=True, slots=True, repr=False)
class TrialRow(Displayed):
    """A candidate of the report: its score, larger for better, on a number of examples, or the error of its trial."""

    name: str
    number: int
    score: float | None
    shown: str
    examples: int
    complete: bool
    seconds: float
    error: str

    @classmethod
    def of(cls, trial: Trial, metric: Objective | None, minimized: bool = False) -> TrialRow:
        """Return the row of a trial."""
        failed = bool(trial.error)
        return cls(
            name=trial.candidate.name,
            number=trial.number,
            score=None if failed else trial.score,
            shown="failed" if failed else show_score(trial.score, metric, minimized),
            examples=sum(map(len, trial.values)),
            complete=trial.complete,
            seconds=trial.seconds,
            error=trial.error,
        )


@dataclass(frozen=True, slots=True, repr=False)
class ComparedRow(Displayed):
    """A choice on the examples to report on: its score by task and over all, and the winner's lead over it."""

    title: str
    name: str
    score: float
    shown: str
    tasks: tuple[str, ...]
    ahead: Gap | None


@dataclass(frozen=True, slots=True, repr=False)
class SearchReport(Tabular):
    """The results of a search.

    Attributes:
        trials: all candidates, the best first.
        rows: the winner and the trivial choices on the examples to report on, or else on the examples to choose by.
        tested: whether the rows were measured on examples that nothing was chosen by.
        metric: the measure; None for a command's score.
        tasks: the names of the tasks.
        optimism: how much better the winner looks on the examples that chose it; None for a command's score.
        verdict: the result in a sentence.
        facts: all other figures, for JSON.
        notices: remarks on the search.
    """

    trials: tuple[TrialRow, ...]
    rows: tuple[ComparedRow, ...]
    tested: bool
    metric: Objective | None
    tasks: tuple[str, ...]
    optimism: float | None
    verdict: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def _display_table(self) -> Table:
        header, *rows = self.table()
        on = "test" if self.tested else "validation"
        return Table(f"Search: {on} examples", header, rows=rows, notes=[self.verdict, *count_notices(self.notices)])

    def table(self) -> list[tuple[str, ...]]:
        """Return the compared rows as they are printed, after a line of headings."""
        header = ("", self.metric or "score", self.lead_heading, "")
        return [header, *((row.title, row.shown, self.lead(row), row.name) for row in self.rows)]

    @property
    def lead_heading(self) -> str:
        """The heading of the winner's leads: a command's scores have no interval."""
        return f"winner ahead by ({LEVEL:.0%} interval)" if self.metric else "winner ahead by"

    def lead(self, row: ComparedRow) -> str:
        """Return the winner's lead over a row as text."""
        if row.ahead is None:
            return ""
        if self.metric is None:
            return f"{row.ahead.mean:+.4g}"
        accurate = self.metric in ("accuracy", "exact_match")
        return row.ahead.text("accuracy" if accurate else "loss")

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        values = {
            "verdict": self.verdict,
            "metric": self.metric or "score",
            "measured_on": "test" if self.tested else "validation",
            "interval": LEVEL,
            "tasks": list(self.tasks),
            "optimism": self.optimism,
            "rows": [asdict(row) for row in self.rows],
            "trials": [asdict(row) for row in self.trials],
            **self.facts,
            "notices": list(self.notices),
        }
        plain: dict[str, Any] = _plain(values)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def compare_rows(
    measured: Sequence[tuple[str, str, Sequence[Tensor]]],
    metric: Objective | None,
    *,
    resamples: int,
    seed: int,
    minimized: bool = False,
) -> list[ComparedRow]:
    """Return the rows of choices: title, name, and for each task the value of each example. The winner comes first.

    Tasks count equally. Intervals are paired bootstraps over the examples; a command's score has none.
    """
    winner = measured[0][2]
    rows = []
    for place, (title, name, values) in enumerate(measured):
        ahead = None
        if place and metric is not None:
            ahead = paired_bootstrap(_weigh_tasks(winner), _weigh_tasks(values), resamples, seed)
        elif place:
            gap = mean_of_tasks(winner) - mean_of_tasks(values)
            ahead = Gap(gap, gap, gap)
        score = mean_of_tasks(values)
        tasks = tuple(show_score(float(each.mean()), metric, minimized) for each in values)
        rows.append(ComparedRow(title, name, score, show_score(score, metric, minimized), tasks, ahead))
    return rows


def _weigh_tasks(values: Sequence[Tensor]) -> Tensor:
    """Return all values in one row, weighted so that their mean is the mean over tasks."""
    total = sum(map(len, values))
    return torch.cat([each * (total / (len(values) * len(each))) for each in values])


def estimate_optimism(trials: Sequence[Trial], seed: int) -> float | None:
    """Return how much better than on new examples the best candidate looks on the examples that chose it.

    The choice is repeated on resamples of the examples (a bootstrap). The optimism is the mean difference between the
    score of the chosen candidate on the resample, and its score on the examples that the resample left out.

    Args:
        trials: the trials on all examples.
        seed: the seed of the resamples.
    """
    tried = [trial for trial in trials if trial.complete and trial.candidate.name != BASE]
    if len(tried) < 2 or min(map(len, tried[0].values)) < 2:
        return None
    tasks = [torch.stack([trial.values[task] for trial in tried]) for task in range(len(tried[0].values))]
    random = generator(seed, "optimism")
    gaps = []
    for _ in range(_DRAWS):
        inside, outside = torch.zeros(len(tried), dtype=torch.float64), torch.zeros(len(tried), dtype=torch.float64)
        for values in tasks:
            count = values.shape[1]
            drawn = torch.bincount(torch.randint(count, (count,), generator=random), minlength=count).double()
            left = (drawn == 0).double()
            if not left.any():
                left = torch.ones(count, dtype=torch.float64)
            inside += values.double() @ drawn / count / len(tasks)
            outside += values.double() @ left / left.sum() / len(tasks)
        best = int(inside.argmax())
        gaps.append(float(inside[best] - outside[best]))
    return sum(gaps) / len(gaps)
