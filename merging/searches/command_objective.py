"""Evaluation of candidates by a command or a function that scores a model's files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from merging.api.merge_files import merge_plan, plan_for
from merging.errors import MergingError
from merging.hub.address import local_path
from merging.maths.lazy_torch import torch
from merging.searches.evaluator import Measured, Request
from merging.searches.memory_merger import MergeInputs
from merging.searches.spaces import MergeCandidate
from merging.soups.scoring import ScoreFunction, make_scorer
from merging.storage.atomic import existing_parent

__all__ = ["CommandObjective", "CommandScorer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandObjective:
    """All that decides a score; workers make their own scorer from it.

    Attributes:
        inputs: the models and the options of their merge.
        score: a command, or a function.
        timeout: the most seconds for a model.
        minimize: whether lower scores are better.
        destination: the output, whose name the models to be scored have.
        scratch: the folder in which they are written, or next to which while it does not exist.
        threads: the threads of a worker's merge; None for all cores.
    """

    inputs: MergeInputs
    score: str | ScoreFunction
    timeout: float
    minimize: bool
    destination: Path
    scratch: Path
    threads: int | None = None

    def load(self) -> CommandScorer:
        """Return the scorer."""
        return CommandScorer(self)


class CommandScorer:
    """Writes a candidate, scores it, and removes it again. A base or a model that is a folder is scored as it is."""

    def __init__(self, objective: CommandObjective) -> None:
        self.objective = objective
        self._score = make_scorer(objective.score, objective.timeout)

    def __call__(self, request: Request) -> Measured:
        """Score a candidate or an output. A merge or a command that fails is an answer with an error."""
        began = perf_counter()
        try:
            score = self._of(request.merge)
        except MergingError as error:
            return Measured((), (), str(error), perf_counter() - began)
        value = torch.tensor([-score if self.objective.minimize else score], dtype=torch.float64)
        return Measured((value,), (torch.zeros(1, dtype=torch.float64),), "", perf_counter() - began)

    def _of(self, merge: MergeCandidate | str) -> float:
        inputs = self.objective.inputs
        if isinstance(merge, str):
            return self._score(Path(merge))
        if merge.chain is None:
            assert inputs.base is not None
            return self._score(local_path(inputs.base))
        if len(merge.models) == 1 and local_path(inputs.models[merge.models[0]]).is_dir():
            return self._score(local_path(inputs.models[merge.models[0]]))
        above = existing_parent(self.objective.scratch / "model")
        with tempfile.TemporaryDirectory(prefix=".merging-search-", dir=above) as folder:
            model = Path(folder) / self.objective.destination.name
            merge_plan(plan_for(inputs.recipe(merge), model), model, threads=self.objective.threads)
            return self._score(model)
