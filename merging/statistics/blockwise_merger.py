"""A merge of several models that goes on block by block, with statistics gathered on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from merging.api.merge_files import merge_recipe
from merging.display.progress import Progress
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.engine.model_reader import ModelReader, Room
from merging.maths.layer_statistics import InputGram, LayerStatistics
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods.chains import chain
from merging.plan import make_plan
from merging.pool.network_weights import NetworkWeights
from merging.statistics.gathering import InputGrams, count_tokens
from merging.statistics.layers import HookedLayer, find_layers, group_by_input
from merging.statistics.network import RunnableModel
from merging.statistics.writing import GatheredLayers, round_trip

__all__ = ["BlockwiseMerger"]

Encoded = Sequence[dict[str, Tensor]]
"""The inputs of one model's examples."""


class BlockwiseMerger:
    """Merges models by RegMean in one network, block after block, with the inputs that each block really has.

    Args:
        running: the base, whose weights are replaced.
        models: the names of the models.
        options: the options of the merge, ``base`` among them.
        off_diagonal: the parameter of RegMean.
    """

    def __init__(
        self, running: RunnableModel, models: Sequence[str], options: Mapping[str, Any], off_diagonal: float
    ) -> None:
        self._running, self._models = running, models
        self._method = chain("regmean", {"off_diagonal": off_diagonal})
        self._method.check(len(models))
        recipe = merge_recipe(list(models), "task_arithmetic", {**options, "kind": "model"})
        device = running.network.device
        self._reader = ModelReader(make_plan(recipe), device, Room())
        shapes = {item.site.name: item.site.shape for item in self._reader.plan.items}
        self._weights = NetworkWeights(
            running.network, self._base_tensors(), running.name, shapes, remedy="gather statistics of each model alone"
        )
        self._stored = {own: name for name, own in self._weights.names.items()}

    def gather(
        self, examples: Sequence[Encoded], directions: int, progress: Progress | None
    ) -> tuple[GatheredLayers, ...]:
        """Return the statistics of each model on its own examples, by the names of the base's tensors."""
        with torch.no_grad():
            self._merge(self._reader.sites, {})
            stages = self._find_stages(partial(self._running.run, examples[0][0]))
            grams: list[dict[str, InputGram]] = [{} for _ in self._models]
            runs = sum(map(len, examples))
            for number, stage in enumerate(stages):
                for model, each in enumerate(examples):
                    done = number * runs + sum(map(len, examples[:model]))
                    self._weights.load(self._own_tensors(model, stage.names))
                    seen = InputGrams(self._models[model], directions)
                    with seen.hook(stage.leaders):
                        for count, inputs in enumerate(each, 1):
                            self._running.run(inputs)
                            if progress:
                                progress(done + count, len(stages) * runs)
                    grams[model] |= {self._stored[name]: gram for name, gram in seen.result().items()}
                self._merge(stage.names, stage.statistics(grams))
        shared = {name: leader for stage in stages for name, leader in stage.shared.items()}
        return tuple(
            GatheredLayers(
                grams=found,
                shared={name: leader for name, leader in shared.items() if leader in found},
                examples=len(each),
                tokens=sum(map(count_tokens, each)),
            )
            for found, each in zip(grams, examples, strict=True)
        )

    def _find_stages(self, run: Callable[[], Any]) -> list[_Stage]:
        """Return the blocks, and each layer outside the blocks, in the order in which they run."""
        layers = [layer for layer in find_layers(self._running.network) if layer.name in self._stored]
        modules = {layer.name: layer for layer in layers}
        stages: dict[tuple[str, int], _Stage] = {}
        first: dict[tuple[tuple[str, int], str], str] = {}
        for name, leader in group_by_input(layers, run).items():
            place = _place_of(self._reader.sites[self._stored[name]])
            if place not in stages:
                names = tuple(each for each, site in self._reader.sites.items() if _place_of(site) == place)
                stages[place] = _Stage(names, [], {})
            stage = stages[place]
            own = first.setdefault((place, leader), name)  # another block's inputs may be gathered at another time
            if own == name:
                stage.leaders.append(modules[name])
            else:
                stage.shared[self._stored[name]] = self._stored[own]
        return list(stages.values())

    def _merge(self, names: Iterable[str], statistics: Mapping[str, Sequence[LayerStatistics | None]]) -> None:
        """Put the merge of some tensors into the network."""
        without = (None,) * len(self._models)

        def read(name: str) -> TensorInputs:
            stack, base = self._reader.read(name)
            return TensorInputs(stack.with_statistics(statistics.get(name, without)), base)

        sites = {name: self._reader.sites[name] for name in names}
        for name, change, base in merge_in_memory(self._method, sites, read, weights=False):
            assert base is not None
            self._weights.load([(name, (base + change.dense()).to(self._reader.dtypes[name]))])

    def _own_tensors(self, model: int, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            stack, base = self._reader.read(name)
            assert base is not None
            yield name, base + stack.deltas[model].dense()

    def _base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._reader.sites:
            base = self._reader.read(name).base
            assert base is not None
            yield name, base


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """A block, or a layer outside the blocks.

    ``names`` are its tensors. ``leaders`` are its layers with different inputs, and ``shared`` has the others and the
    leader with the same inputs.
    """

    names: tuple[str, ...]
    leaders: list[HookedLayer]
    shared: dict[str, str]

    def statistics(self, grams: Sequence[Mapping[str, InputGram]]) -> dict[str, list[LayerStatistics | None]]:
        """Return the statistics of each tensor by model, as a file will hold them."""
        found: dict[str, list[LayerStatistics | None]] = {}
        for name in self.names:
            own = [each.get(self.shared.get(name, name)) for each in grams]
            found[name] = [None if gram is None else _GatheredStatistics(round_trip(gram)) for gram in own]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _GatheredStatistics(LayerStatistics):
    """The Gram matrix of a layer in memory."""

    gram: InputGram

    def read_inputs(self) -> InputGram:
        return self.gram

    def read_fisher(self, start: int, count: int) -> None:
        return None


def _place_of(site: Site) -> tuple[str, int]:
    """Return the block of a tensor; outside the blocks, the tensor itself."""
    position = site.position
    return (str(position.stack), position.layer) if position.layer is not None else (site.name, 0)
