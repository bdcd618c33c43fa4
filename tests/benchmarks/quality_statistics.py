"""Statistics of the tasks' unlabelled texts, for the methods of quality.py that merge by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from encoder import Head
from torch import Tensor, nn

import merging
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.maths.delta import Delta, Stack
from merging.maths.layer_statistics import InputGram, LayerStatistics
from merging.maths.layers import Stacks
from merging.maths.site import site_of
from merging.statistics.examples import StatisticsExample
from merging.statistics.fisher_information import FisherAccumulator
from merging.statistics.gathering import gather_layers
from merging.statistics.network import RunnableModel
from merging.statistics.writing import GatheredLayers

__all__ = ["TaskEncoder", "gather_statistics", "merge_by_statistics"]


class TaskEncoder(RunnableModel):
    """An encoder with the frozen head of a task, so that it has predictions."""

    def __init__(self, name: str, encoder: nn.Module, tokenizer: Any, head: Head) -> None:
        super().__init__(name=name, network=encoder, processor=tokenizer, images=False, limit=64)
        self._head = head

    def run(self, inputs: dict[str, Tensor]) -> Any:
        """The logits of one text, which has no padding."""
        hidden = self.network(**inputs).last_hidden_state
        return SimpleNamespace(logits=self._head(nn.functional.normalize(hidden.mean(1), dim=-1)))


def gather_statistics(model: TaskEncoder, texts: Sequence[str], fisher: bool) -> GatheredLayers:
    """Statistics of a model on texts of its own task."""
    examples = [StatisticsExample(f"text {number}", text) for number, text in enumerate(texts)]
    information = FisherAccumulator(model, "sampled", 0) if fisher else None
    return gather_layers(
        model, examples, most=None, directions=512, fisher=information, progress=None, expected=len(texts)
    )


@dataclass(frozen=True)
class _Gathered(LayerStatistics):
    """The statistics of one tensor in one model."""

    gram: InputGram | None
    fisher: Tensor | None

    def read_inputs(self) -> InputGram | None:
        return self.gram

    def read_fisher(self, start: int, count: int) -> Tensor | None:
        return None if self.fisher is None else self.fisher.flatten()[start : start + count]


def merge_by_statistics(
    models: Sequence[Mapping[str, Delta]], gathered: Sequence[GatheredLayers], method: str, parameters: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The merged changes of models whose changes are in memory, by the names of the base's tensors."""
    stacks = Stacks.from_names(models[0])
    sites = {name: site_of(name, change.shape, stacks) for name, change in models[0].items()}

    def read(name: str) -> TensorInputs:
        own = [each.grams.get(each.shared.get(name, name)) for each in gathered]
        fisher = [each.fisher.get(name) for each in gathered]
        statistics = [_Gathered(*pair) for pair in zip(own, fisher, strict=True)]
        return TensorInputs(Stack([model[name] for model in models]).with_statistics(statistics), None)

    for name, change, _ in merge_in_memory(merging.chain(method, parameters), sites, read, weights=False):
        yield name, change.dense()
