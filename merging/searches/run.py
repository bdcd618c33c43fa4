"""The steps of a search: evaluation here or on a cluster, and the measurement of the winner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merging.cluster import RayCluster
from merging.engine.evaluation import evaluate_each
from merging.errors import InputError
from merging.recycling.data import overlaps
from merging.recycling.input_states import input_states
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.searches.command_objective import CommandObjective, CommandScorer
from merging.searches.evaluator import DataObjective, Evaluator, Measured, Request
from merging.searches.gradient import check_tunable, tune_by_gradient
from merging.searches.report import (
    WINNER,
    ComparedRow,
    SearchReport,
    TrialRow,
    compare_rows,
    estimate_optimism,
)
from merging.searches.settings import BY_GRADIENT, Objective, SearchSettings
from merging.searches.spaces import BASE, CandidateSpace, MergeCandidate
from merging.searches.trials import Trial, Trials, show_score
from merging.version import __version__

__all__ = ["SearchRun", "plan_facts"]

_TUNED = "tuned"

SearchObjective = DataObjective | CommandObjective


@dataclass(slots=True)
class SearchRun:
    """A search under way.

    Attributes:
        objective: what candidates are measured by.
        settings: the settings.
        cluster: the cluster that evaluates; None evaluates here.
        on_event: receives a line about each trial.
    """

    objective: SearchObjective
    settings: SearchSettings
    cluster: RayCluster | None
    on_event: Callable[[str], None]
    _local: Evaluator | CommandScorer | None = field(default=None, init=False)

    @property
    def metric(self) -> Objective | None:
        """The measure; None for a command's score."""
        return self.objective.metric if isinstance(self.objective, DataObjective) else None

    @property
    def minimized(self) -> bool:
        """Whether scores are a command's numbers with the other sign."""
        return self.metric is None and self.settings.minimize

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(t.name for t in self.objective.tasks) if isinstance(self.objective, DataObjective) else ("score",)

    def _counts(self, part: str) -> list[int]:
        """Return the number of examples of each task in a part; a command's score is one."""
        if isinstance(self.objective, CommandObjective):
            return [1] if part == "valid" else []
        return [len(task.valid if part == "valid" else task.test) for task in self.objective.tasks]

    def local(self) -> Evaluator | CommandScorer:
        """Return the evaluator of this process, which is made once."""
        if self._local is None:
            self._local = self.objective.load()
        return self._local

    def trials(self, checkpoint: RunCheckpoint) -> Trials:
        """Return the trials of the search, with what a killed run kept in the checkpoint."""
        return Trials(
            self.evaluate,
            checkpoint,
            examples=self._counts("valid"),
            budget=self.settings.budget,
            minutes=self.settings.minutes,
            on_trial=self._show,
        )

    def tune(self, checkpoint: RunCheckpoint) -> MergeCandidate:
        """Return the candidate of a strategy by gradient, which a killed run may have kept."""
        if _TUNED not in checkpoint:
            evaluator = self._data_evaluator()
            self.on_event(f"tuning {self.settings.steps} steps")
            checkpoint.keep(_TUNED, asdict(tune_by_gradient(evaluator, self.settings)))
        return MergeCandidate(**checkpoint.get(_TUNED))

    def check_tunable(self) -> None:
        """Refuse models that the strategy cannot tune. Raises :class:`~merging.errors.OptionError`."""
        if self.settings.strategy in BY_GRADIENT:
            check_tunable(self._data_evaluator(), self.settings)

    def _data_evaluator(self) -> Evaluator:
        evaluator = self.local()
        assert isinstance(evaluator, Evaluator)
        return evaluator

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Measured]:
        """Answer requests in their order, here or on the cluster."""
        prepare = self.objective.load if self.cluster else self.local
        inputs = self.objective.inputs
        models = [*inputs.models, *([inputs.base] if inputs.base else [])]
        tasks = ((request, request) for request in requests)
        with closing(evaluate_each(tasks, prepare, self.cluster, models=models)) as results:
            for _, measured in results:
                yield measured

    def _show(self, trial: Trial) -> None:
        score = f"failed: {trial.error}" if trial.error else show_score(trial.score, self.metric, self.minimized)
        count = f" on {sum(map(len, trial.values))} examples" if self.metric and not trial.error else ""
        self.on_event(f"{trial.candidate.name}: {score}{count}")

    def report(self, trials: Trials, winner: Trial, written: Path) -> SearchReport:
        """Measure the written winner and the trivial choices on the examples to report on, and return the report."""
        tested = isinstance(self.objective, DataObjective) and all(task.test for task in self.objective.tasks)
        rows = self._compare(trials, winner, written, tested)
        optimism = estimate_optimism(trials.complete, self.settings.seed) if self.metric else None
        made = [TrialRow.of(trial, self.metric, self.minimized) for trial in trials.found.values()]
        made.sort(key=lambda row: (not row.complete, row.score is None, -(row.score or 0.0), row.number))
        return SearchReport(
            trials=tuple(made),
            rows=tuple(rows),
            tested=tested,
            metric=self.metric,
            tasks=self.tasks,
            optimism=optimism,
            verdict=self._verdict(rows, winner, tested, len(trials.found)),
            facts=self._facts(trials, winner),
            notices=tuple(self._notices(trials)),
        )

    def _compare(self, trials: Trials, winner: Trial, written: Path, tested: bool) -> list[ComparedRow]:
        trivial = [trial for trial in trials.complete if not trial.candidate.space]
        alone = [trial for trial in trivial if trial.candidate.name.endswith(" alone")]
        titled = {trial.candidate.name: trial for trial in trivial if trial not in alone}
        compared = {WINNER: winner}
        compared |= {BASE: titled.pop(BASE)} if BASE in titled else {}
        compared |= {"best single model": alone[0]} if alone else {}
        compared |= titled
        if isinstance(self.objective, CommandObjective):
            return compare_rows(
                [(title, trial.candidate.name, trial.values) for title, trial in compared.items()],
                None,
                resamples=self.settings.resamples,
                seed=self.settings.seed,
                minimized=self.minimized,
            )
        evaluator = self.local()
        part = "test" if tested else "valid"
        ranges = tuple((0, len(task.test if tested else task.valid)) for task in self.objective.tasks)
        measured = []
        for title, trial in compared.items():
            merge: MergeCandidate | str = str(written) if title == WINNER else trial.candidate
            answer = evaluator(Request(merge, part, ranges))
            if answer.error:
                raise InputError(f"{trial.candidate.name}: {answer.error}")
            measured.append((title, trial.candidate.name, answer.values))
        return compare_rows(measured, self.metric, resamples=self.settings.resamples, seed=self.settings.seed)

    def _verdict(self, rows: Sequence[ComparedRow], winner: Trial, tested: bool, tried: int) -> str:
        name = winner.candidate.name
        if self.metric is None:
            return f"{name}: score {rows[0].shown}, the best of {tried} candidates by the scores that chose it"
        if not tested:
            return f"{name}: {self.metric} {rows[0].shown} on the examples that chose it, so that nothing is concluded"
        others = [row for row in rows[1:] if row.ahead is not None and not row.ahead.above]
        said = f"{name}: {self.metric.replace('_', ' ')} {rows[0].shown} on {sum(self._counts('test'))} test examples"
        if not others:
            return f"{said}, ahead of every trivial choice beyond chance"
        return f"{said}, not ahead beyond chance of: {', '.join(row.title for row in others)}"

    def _facts(self, trials: Trials, winner: Trial) -> dict[str, Any]:
        inputs = self.objective.inputs
        curve: list[tuple[int, float]] = []
        for trial in sorted(trials.complete, key=lambda each: each.number):
            if trial.candidate.chain is not None and (not curve or trial.score > curve[-1][1]):
                curve.append((trial.number, trial.score))
        return {
            "models": list(inputs.models),
            "base": inputs.base,
            "examples": {"valid": list(trials.examples), "test": self._counts("test")},
            "evaluations": trials.used,
            "candidates": len(trials.found),
            "seconds": trials.seconds,
            "curve": curve,
            "winner": {"name": winner.candidate.name, "valid": winner.score},
            "settings": json.loads(self.settings.model_dump_json()),
        }

    def _notices(self, trials: Trials) -> list[str]:
        notices = []
        failed = [trial for trial in trials.found.values() if trial.error]
        if failed:
            first = failed[0]
            notices.append(f"{len(failed)} candidates failed, {first.candidate.name} first: {first.error}")
        if isinstance(self.objective, DataObjective):
            for task in self.objective.tasks:
                notices += [f"{task.name}: {remark}" for remark in overlaps(task.split) if "test" in remark]
            evaluator = self._data_evaluator()
            cut = sum(model.cut for model in evaluator.models)
            if cut:
                notices.append(f"{cut} texts were longer than {evaluator.models[0].limit} tokens and were cut")
        return notices


def plan_facts(
    objective: SearchObjective, spaces: Sequence[CandidateSpace], settings: SearchSettings
) -> dict[str, Any]:
    """Return everything that decides the outcome, to recognize the search that a kill interrupted."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]

    inputs = objective.inputs
    plain = json.loads(settings.model_dump_json())
    facts: dict[str, Any] = {
        "version": __version__,
        "models": input_states(inputs.models),
        "base": input_states([inputs.base] if inputs.base else []),
        "statistics": input_states(inputs.statistics_files),
        "options": digest(sorted(inputs.options.items())),
        "candidates": [space.text for space in spaces],
        **{name: value for name, value in plain.items() if name not in ("budget", "minutes")},
    }
    if isinstance(objective, CommandObjective):
        return {**facts, "score": objective.score if isinstance(objective.score, str) else "a function"}
    tasks = [[[each.content for each in part] for part in (task.valid, task.test)] for task in objective.tasks]
    return {**facts, "examples": digest(tasks)}
