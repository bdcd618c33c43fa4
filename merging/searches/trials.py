"""Trials of a search: candidates with their results, kept on the disk as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, inf
from typing import Any

from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.searches.evaluator import Measured, Request
from merging.searches.settings import Objective
from merging.searches.spaces import MergeCandidate

__all__ = ["AnswerRequests", "Trial", "Trials", "mean_of_tasks", "show_score"]

AnswerRequests = Callable[[Sequence[Request]], Iterator[Measured]]
"""Answers requests in their order."""


def mean_of_tasks(values: Sequence[Tensor]) -> float:
    """Return the mean over tasks of the mean over their examples."""
    return float(torch.stack([each.mean() for each in values]).mean()) if values else -inf


def show_score(score: float, metric: Objective | None, minimized: bool = False) -> str:
    """Return a score, for which larger is better, as the number of its measure.

    Args:
        score: the score.
        metric: the measure; None for a command's number.
        minimized: whether the score is a command's number with the other sign, since lower numbers are better.
    """
    if metric in ("accuracy", "exact_match"):
        return f"{100 * score:.1f}"
    if metric == "perplexity":
        return f"{exp(min(-score, 700.0)):.4g}"
    return f"{score if metric is None and not minimized else -score:.4g}"


@dataclass(slots=True, eq=False)
class Trial:
    """A candidate and its results so far.

    Attributes:
        candidate: the candidate.
        number: the evaluation in which it was first tried, from 1.
        values: for each task the value of each example, larger for better.
        losses: for each task the loss of each example.
        complete: whether it was measured on all examples.
        error: why it has no result; empty if it has one.
        seconds: the time of its evaluations.
    """

    candidate: MergeCandidate
    number: int
    values: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    complete: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """The mean over tasks, larger for better; minus infinity without a result."""
        return -inf if self.error else mean_of_tasks(self.values)

    @property
    def rank_key(self) -> tuple[float, float, int]:
        """A key that sorts trials from the worst to the best: equal scores go by the loss, then by the order."""
        return self.score, -inf if self.error else -mean_of_tasks(self.losses), -self.number

    def add(self, measured: Measured) -> None:
        """Add the results on more examples."""
        self.seconds += measured.seconds
        if measured.error:
            self.error = measured.error
            return
        for kept, new in ((self.values, measured.values), (self.losses, measured.losses)):
            kept[:] = [torch.cat(pair) for pair in zip(kept, new, strict=True)] if kept else list(new)


class Trials:
    """All trials of a search. Results that a killed run kept are taken from the disk.

    Attributes:
        found: the trials by the key of their candidates, in their order.
        used: the evaluations that were used.
    """

    def __init__(
        self,
        evaluate: AnswerRequests,
        checkpoint: RunCheckpoint,
        *,
        examples: Sequence[int],
        budget: int,
        minutes: float | None,
        on_trial: Callable[[Trial], None],
    ) -> None:
        self._evaluate, self._checkpoint, self._on_trial = evaluate, checkpoint, on_trial
        self.examples, self._budget, self._minutes = tuple(examples), budget, minutes
        self.found: dict[str, Trial] = {}
        self.used = 0

    @property
    def left(self) -> int:
        """The evaluations that are left, none when the time is over."""
        over = self._minutes is not None and self.seconds >= 60 * self._minutes
        return 0 if over else self._budget - self.used

    @property
    def seconds(self) -> float:
        """The time of all evaluations, of killed runs too."""
        return sum(trial.seconds for trial in self.found.values())

    @property
    def complete(self) -> list[Trial]:
        """The trials on all examples, the best first."""
        done = [trial for trial in self.found.values() if trial.complete]
        return sorted(done, key=lambda trial: trial.rank_key, reverse=True)

    def measure(self, candidates: Sequence[MergeCandidate], share: float = 1.0) -> list[Trial]:
        """Measure candidates on a share of the examples, as far as the budget goes, and return their trials.

        Candidates that were measured on as many examples already cost nothing.

        Raises:
            InputError: if every trial so far has failed.
        """
        stops = tuple(min(count, ceil(count * share)) for count in self.examples)
        trials: list[Trial] = []
        new: list[tuple[Trial, Request]] = []
        for candidate in candidates:
            trial = self.found.get(candidate.key)
            if trial is None:
                if len(new) >= self.left:
                    continue
                trial = self.found[candidate.key] = Trial(candidate, self.used + len(new) + 1)
            starts = tuple(len(each) for each in trial.values) or (0,) * len(stops)
            if trial not in trials:
                trials.append(trial)
            pending = any(each is trial for each, _ in new)
            if not trial.error and not pending and starts < stops and len(new) < self.left:
                new.append((trial, Request(candidate, "valid", tuple(zip(starts, stops, strict=True)))))
        self._run(new)
        for trial in trials:
            trial.complete = not trial.error and tuple(map(len, trial.values)) == self.examples
        if self.found and all(trial.error for trial in self.found.values()):
            raise InputError(f"all {len(self.found)} candidates failed, the last one: {trials[-1].error}")
        return [trial for trial in trials if trial.values or trial.error]

    def _run(self, new: Sequence[tuple[Trial, Request]]) -> None:
        stages = [_stage(request) for _, request in new]
        kept: dict[str, Measured] = {
            stage: _read(self._checkpoint.get(stage)) for stage in stages if stage in self._checkpoint
        }
        asked = [(stage, request) for stage, (_, request) in zip(stages, new, strict=True) if stage not in kept]
        answers = self._evaluate([request for _, request in asked])
        for stage, (trial, _) in zip(stages, new, strict=True):
            measured = kept.get(stage)
            if measured is None:
                measured = next(answers)
                if not measured.error:  # what failed is tried again by a run that goes on
                    self._checkpoint.keep(stage, _plain(measured))
            trial.add(measured)
            self.used += 1
            self._on_trial(trial)


def _stage(request: Request) -> str:
    assert isinstance(request.merge, MergeCandidate)
    spans = "-".join(f"{start}.{stop}" for start, stop in request.ranges)
    return f"{request.merge.key}-{spans}"[:200]


def _plain(measured: Measured) -> dict[str, Any]:
    return {"values": list(measured.values), "losses": list(measured.losses), "seconds": measured.seconds}


def _read(kept: Mapping[str, Any]) -> Measured:
    return Measured(tuple(kept["values"]), tuple(kept["losses"]), "", float(kept["seconds"]))
