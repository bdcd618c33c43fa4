"""Running examples through a model, and summing up the inputs of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from merging.display.progress import Progress
from merging.errors import InputError, OptionError, option
from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.statistics.examples import StatisticsExample
from merging.statistics.fisher_information import FisherAccumulator
from merging.statistics.gram_accumulator import GramAccumulator
from merging.statistics.layers import HookedLayer, find_layers, group_by_input, hook_inputs
from merging.statistics.network import RunnableModel
from merging.statistics.writing import GatheredLayers

__all__ = ["InputGrams", "check_limits", "count_tokens", "encode_examples", "gather_layers"]


def check_limits(**limits: int | None) -> None:
    """Refuse limits below 1; None is no limit. Raises :class:`~merging.errors.OptionError`."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise OptionError(f"{option(name, value)}: should be at least 1")


def encode_examples(
    running: RunnableModel, examples: Iterable[StatisticsExample], most: int | None, least: int = 1
) -> Iterator[tuple[StatisticsExample, dict[str, Tensor]]]:
    """Yield examples with the inputs of the model, of at most ``most`` tokens in all.

    They end where the limit leaves an example fewer than ``least`` tokens, but for the first.
    """
    tokens = 0
    for example in examples:
        left = None if most is None else most - tokens
        if left is not None and left < (least if tokens else 1):
            return
        inputs = running.encode(example, left)
        tokens += count_tokens(inputs)
        yield example, inputs


def count_tokens(inputs: dict[str, Tensor]) -> int:
    """Return the number of tokens of an encoded example, 0 for an image."""
    return inputs["input_ids"].numel() if "input_ids" in inputs else 0


class InputGrams:
    """The Gram matrices of the inputs of some layers, of examples that run in the context of :meth:`hook`."""

    def __init__(self, where: str, directions: int) -> None:
        self._where, self._directions = where, directions
        self._grams: dict[str, GramAccumulator] = {}

    def hook(self, layers: Sequence[HookedLayer]) -> AbstractContextManager[None]:
        """Return a context in which the inputs of the layers are added."""
        return hook_inputs(list(layers), self._add)

    def _add(self, layer: HookedLayer, inputs: Any) -> None:
        if not bool(inputs.isfinite().all()):
            raise InputError(f"{self._where}: the inputs of {layer.name} are not finite on the examples")
        if layer.name not in self._grams:
            self._grams[layer.name] = GramAccumulator(layer.width, self._directions, inputs.device)
        self._grams[layer.name].add(inputs.reshape(-1, layer.width))

    def result(self) -> dict[str, InputGram]:
        """Return the matrices by layer."""
        return {name: gram.result() for name, gram in self._grams.items()}


def gather_layers(
    running: RunnableModel,
    examples: Iterable[StatisticsExample],
    *,
    most: int | None,
    directions: int,
    fisher: FisherAccumulator | None,
    progress: Progress | None,
    expected: int,
) -> GatheredLayers:
    """Run examples one by one, and return the statistics of the layers by their names in the running model."""
    layers = find_layers(running.network)
    leaders: dict[str, str] = {}
    grams = InputGrams(running.name, directions)
    count = tokens = 0
    least = 2 if fisher is not None and fisher.outputs == "labels" else 1  # a token, and the next one
    for example, inputs in encode_examples(running, examples, most, least):
        with torch.set_grad_enabled(fisher is not None):
            if not leaders:
                with torch.no_grad():
                    leaders = dict(group_by_input(layers, partial(running.run, inputs)))
            with grams.hook([layer for layer in layers if leaders[layer.name] == layer.name]):
                output = running.run(inputs)
            if fisher is not None:
                fisher.add(example, inputs, output)
        count += 1
        tokens += count_tokens(inputs)
        if progress:
            progress(count, expected)
    if progress and count and count < expected:
        progress(count, count)
    importance, size = fisher.result() if fisher is not None and count else ({}, 0.0)
    found = grams.result()
    shared = {name: leader for name, leader in leaders.items() if leader != name and leader in found}
    return GatheredLayers(found, shared, importance, size, count, tokens)
