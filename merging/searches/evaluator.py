"""Evaluation of candidates on examples: weights are merged in memory and put into one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from merging.errors import MergingError, OptionError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.pool.network_weights import NetworkWeights
from merging.recycling.load_base import load_network
from merging.recycling.model import Classifier, EncodedExample, Scores, TaskModel
from merging.searches.examples import SearchTask
from merging.searches.memory_merger import MemoryMerger, MergeInputs
from merging.searches.settings import Objective, SearchSettings
from merging.searches.spaces import MergeCandidate

__all__ = ["DataObjective", "Evaluator", "Measured", "Request"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A question to an evaluator: a candidate, or the path of an output, on a range of examples of each task."""

    merge: MergeCandidate | str
    part: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return self.merge if isinstance(self.merge, str) else self.merge.name


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """An answer: for each task the value of each example, larger for better, and its loss; or an error.

    ``seconds`` is the time of the merge and of the evaluation.
    """

    values: tuple[Tensor, ...]
    losses: tuple[Tensor, ...]
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataObjective:
    """All that decides an evaluation on examples; workers make their own evaluator from it.

    Attributes:
        inputs: the models and the options of their merge.
        tasks: the examples.
        metric: the measure.
        settings: the settings.
        device: the device that the model runs on.
    """

    inputs: MergeInputs
    tasks: tuple[SearchTask, ...]
    metric: Objective
    settings: SearchSettings
    device: str

    def load(self) -> Evaluator:
        """Load the model and open the merge's inputs."""
        return Evaluator(self)


class Evaluator:
    """Measures candidates. It holds one loaded model, and the models' changes as far as the memory allows.

    Attributes:
        merger: merges candidates.
        weights: puts weights into the model.
        models: the model of each task; all share one network, but for heads.
        valid: the examples to choose by, of each task.
        test: the examples to report on, of each task.
    """

    def __init__(self, objective: DataObjective) -> None:
        self.objective = objective
        device, settings = torch.device(objective.device), objective.settings
        where = objective.inputs.base or objective.inputs.models[0]
        kind = objective.tasks[0].valid[0].kind
        own_heads = settings.head == "models"
        plain = (settings.model_copy(update={"head": "labels"}) if own_heads else settings).of_models()
        loaded = load_network(where, kind, plain, device)
        self.models: list[TaskModel] = (
            self._own_heads(loaded.network, device)
            if own_heads
            else [loaded.model_for(task.split, plain) for task in objective.tasks]
        )
        self.valid = self._encode([task.valid for task in objective.tasks])
        self.test = self._encode([task.test for task in objective.tasks])
        self.merger = MemoryMerger(objective.inputs, device)
        first = MergeCandidate("", None, {}, ()) if self.merger.based else MergeCandidate("", "linear", {}, (0,))
        shapes = {item.site.name: item.site.shape for item in self.merger.reader.plan.items}
        remedy = f"score their files with {option('score', 'COMMAND')}"
        self.weights = NetworkWeights(loaded.network, self.merger.merge(first), where, shapes, remedy)

    def __call__(self, request: Request) -> Measured:
        """Measure a candidate or an output. A merge that cannot be made is an answer with an error."""
        began = perf_counter()
        try:
            merge = request.merge
            merged = self.merger.merged_file(merge) if isinstance(merge, str) else self.merger.merge(merge)
            self.weights.load(merged)
        except MergingError as error:
            return Measured((), (), str(error), perf_counter() - began)
        parts = self.valid if request.part == "valid" else self.test
        scores = [
            model.scores(items[start:stop], entropies=self.objective.metric == "entropy")
            for model, items, (start, stop) in zip(self.models, parts, request.ranges, strict=True)
        ]
        values = tuple(_values(each, self.objective.metric) for each in scores)
        finite = all(bool(each.isfinite().all()) for each in values)
        failure = "" if finite else "the model's answers are not finite"
        return Measured(values, tuple(each.losses for each in scores), failure, perf_counter() - began)

    def _encode(self, parts: Sequence[Sequence[Any]]) -> list[list[EncodedExample]]:
        return [[model.encode(each) for each in part] for model, part in zip(self.models, parts, strict=True)]

    def _own_heads(self, body: Any, device: torch.device) -> list[TaskModel]:
        """Return a classifier for each task: the head of the task's own model on the shared body."""
        objective, settings = self.objective, self.objective.settings.model_copy(update={"head": "model"}).of_models()
        names = objective.inputs.models
        if len(objective.tasks) != len(names):
            raise OptionError(
                f"{option('head', 'models')}: {len(objective.tasks)} tasks and {len(names)} models: give the examples "
                f"of each model's own task, in the order of the models"
            )
        made: list[TaskModel] = []
        for name in names:
            own = load_network(name, "label", settings, device)
            setattr(own.network, own.network.base_model_prefix, body)
            made.append(Classifier(own.network, own.tokenizer, own.limit))
        return made


def _values(scores: Scores, metric: Objective) -> Tensor:
    if metric in ("accuracy", "exact_match"):
        return scores.right
    if metric == "entropy":
        assert scores.entropies is not None
        return -scores.entropies
    return -scores.losses
