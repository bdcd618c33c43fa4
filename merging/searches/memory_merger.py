"""Merges of candidates in memory: only what changes from one candidate to the next is computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from merging.api.merge_files import merge_recipe, plan_for
from merging.api.peft_tensors import limit_rank
from merging.engine.devices import supply_operations
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.engine.model_reader import ChangeStore, ModelReader, Room
from merging.engine.sorted_changes import SortedChanges
from merging.errors import InputError, OptionError, option
from merging.hub.open_model import open_model
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.layer_statistics import LayerStatistics
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import bind_value
from merging.methods.chains import chain
from merging.methods.contract.method import Method
from merging.plan import Plan, make_plan
from merging.plan.inputs.statistics_files import find_needed_statistics
from merging.plan.recipe import Recipe
from merging.searches.spaces import MergeCandidate
from merging.sources import Adapter

__all__ = ["MemoryMerger", "MergeInputs"]

LayerStatisticsByName = Mapping[str, tuple[LayerStatistics | None, ...]]

_PROPORTIONAL = {
    "breadcrumbs",
    "consensus",
    "core",
    "dare",
    "decouple",
    "della",
    "geometric_median",
    "iso_c",
    "iso_cts",
    "knots",
    "magmax",
    "orthogonalize",
    "pcb",
    "ram",
    "sce",
    "svd",
    "task_arithmetic",
    "ties",
    "tsv",
    "varm",
    "wudi",
}
"""The methods and wrappers whose merged change is proportional to the scale; the tests hold it of chains of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInputs:
    """The models of a search, and the options of the recipe that all candidates share.

    Attributes:
        models: the names or paths of the models.
        options: the options of the recipe, ``base`` among them. Only methods that need ``stats`` receive them.
    """

    models: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The base, None where there is none."""
        base = self.options.get("base")
        return None if base is None else str(base)

    @property
    def statistics_files(self) -> list[str]:
        """The files with statistics of examples."""
        given = self.options.get("stats") or ()
        return [str(each) for each in ([given] if isinstance(given, (str, Path)) else given)]

    def all_adapters(self) -> bool:
        """Return whether all models are adapters."""
        opened = (open_model(name, dequantize=bool(self.options.get("dequantize"))) for name in self.models)
        return all(isinstance(model, Adapter) for model in opened)

    def recipe(self, candidate: MergeCandidate) -> Recipe:
        """Return the recipe that writes a candidate."""
        models = [self.models[slot] for slot in candidate.models]
        method = candidate.method()
        return merge_recipe(models, method, _options_for(method, self.options))


def _options_for(method: Method, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a method's recipe: statistics are for methods that need them."""
    needed = find_needed_statistics(method) is not None
    return options if needed else {name: value for name, value in options.items() if name != "stats"}


class MemoryMerger:
    """Merges candidates in memory, with the values that a written merge has.

    The models' changes are read once. The merge of a chain at scale 1 is kept, so that another scale costs one
    multiplication; a chain whose result depends on its scale in another way is merged again. Tensors that no model
    changes are not merged. Where an adapter is written, merged changes are cut to the rank that it will have.

    Attributes:
        reader: reads the models' changes, or their weights where there is no base.
        adapter_written: whether the output is an adapter.
    """

    def __init__(self, inputs: MergeInputs, device: torch.device, room: Room | None = None) -> None:
        self.inputs, self.device = inputs, device
        self._room = room or Room()
        self._store, self._sorted = ChangeStore(self._room), SortedChanges(self._room)
        self._mixed = True  # whether tensors that no model changes may differ from the base in the last bits
        self._plans: dict[tuple[str, tuple[int, ...]], Plan] = {}
        self._weights: dict[bool, ModelReader] = {}
        self._statistics: dict[object, LayerStatisticsByName] = {}
        self._model_options = dict(inputs.options)
        self.adapter_written = inputs.options.get("kind", inputs.options.get("as")) != "model" and inputs.all_adapters()
        if self.adapter_written:
            self._model_options = {
                name: value for name, value in inputs.options.items() if name not in ("rank", "format", "as")
            } | {"kind": "model"}
        chain_of_all = "task_arithmetic" if inputs.base is not None else "linear"
        self.reader: ModelReader = ModelReader(self._make_plan(chain(chain_of_all), inputs.models), device, self._room)

    @property
    def based(self) -> bool:
        """Whether changes from a base are merged, and not weights alone."""
        return self.inputs.base is not None

    def merge(self, candidate: MergeCandidate) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged tensors of a candidate by their names on disk, in the types of the output.

        Tensors that no model changes are left out where the merge before had the base's values in them.
        """
        with torch.no_grad(), supply_operations(self.device):
            if candidate.chain is None:
                yield from ((name, self._base_value(name)) for name in self.reader.sites)
                return
            yield from self._merge(candidate)

    def _base_value(self, name: str) -> Tensor:
        base = self.reader.read(name).base
        assert base is not None
        return base.to(self.reader.dtypes[name])

    def merged_file(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of an output on disk, as they are with the base."""
        self._mixed = True
        written = replace(self.inputs, models=(path,))
        plan = self._make_plan(chain("linear"), written.models)
        reader = ModelReader(plan, self.device, Room(0))
        for name in reader.sites:
            stack, base = reader.read(name)
            change = stack.deltas[0].dense()
            total = change if base is None or plan.weights else base + change
            yield name, total.to(reader.dtypes[name])

    def _merge(self, candidate: MergeCandidate) -> Iterator[tuple[str, Tensor]]:
        method = candidate.method()
        method.check(len(candidate.models))
        reader, weights = self._reader_of(candidate, method)
        self._mixed |= weights
        changes, scale = self._changes(candidate, method, reader, weights)
        unchanged = set() if weights else set(reader.unchanged)
        if self._mixed:  # else the network holds the base's values
            yield from ((name, self._base_value(name)) for name in unchanged)
        for name, change in changes:
            base = None if weights else reader.read(name).base
            if name in unchanged:
                continue
            values = change.dense()
            factor = float(bind_value(scale, reader.sites[name]))
            total = values * factor if base is None else torch.add(base, values, alpha=factor)
            merged = total.to(reader.dtypes[name])
            finite = isfinite(float(merged.sum())) or bool(merged.isfinite().all())
            if not finite and not self.inputs.options.get("allow_nonfinite"):
                raise InputError(f"{name}: the merged values are beyond the range of {merged.dtype}")
            yield name, merged
        self._mixed = weights

    def _changes(
        self, candidate: MergeCandidate, method: Method, reader: ModelReader, weights: bool
    ) -> tuple[Iterator[tuple[str, Delta]], Any]:
        """Return the merged changes, and the scale by which they are to be multiplied."""
        rank = self._rank(candidate)
        unscaled, scale = _split_scale(candidate, method)
        if unscaled is None:
            return self._compute(candidate, method, reader, weights, rank), 1.0
        rest = {key: value for key, value in candidate.parameters.items() if key.rpartition(".")[2] != "scale"}
        key = json.dumps([candidate.chain, sorted(rest.items()), candidate.models, rank], default=str)
        kept = self._store.get(key)
        if kept is None:
            kept = dict(self._compute(candidate, unscaled, reader, weights, rank))
            self._store.put(key, kept)
        return iter(kept.items()), scale

    def _compute(
        self, candidate: MergeCandidate, method: Method, reader: ModelReader, weights: bool, rank: int
    ) -> Iterator[tuple[str, Delta]]:
        statistics = self._layer_statistics(candidate, method)

        def read(name: str) -> TensorInputs:
            stack, base = reader.select(name, candidate.models, factors=method.takes_factors and not weights)
            return TensorInputs(stack.with_statistics(statistics.get(name, ())), base)

        unchanged = () if weights else tuple(reader.unchanged)
        merge = merge_in_memory(method, reader.sites, read, weights, sorted_changes=self._sorted, unchanged=unchanged)
        for name, merged, origin in merge:
            change, base = merged, origin
            if weights and rank and base is None:
                base = reader.read(name).base
                change = change if base is None else Dense(change.dense() - base)
            if rank and len(change.shape) > 1 and (not isinstance(change, LowRank) or change.rank > rank):
                change = limit_rank(change, rank, reader.sites[name].axis == 0)[0]
            yield name, change if not weights or base is None else Dense(base + change.dense())

    def _layer_statistics(self, candidate: MergeCandidate, method: Method) -> LayerStatisticsByName:
        """Return the statistics of examples that a method needs: for each tensor the statistics of each model."""
        needed = find_needed_statistics(method)
        if needed is None:
            return {}
        key = needed, candidate.models
        if key not in self._statistics:
            plan = self._make_plan(method, [self.inputs.models[slot] for slot in candidate.models])
            self._statistics[key] = {item.site.name: item.layer_statistics for item in plan.items}
        return self._statistics[key]

    def _reader_of(self, candidate: MergeCandidate, method: Method) -> tuple[ModelReader, bool]:
        """Return the reader for a method, and whether it merges weights. A linear method merges changes as well."""
        weights = method.merge_space == "weights" and not (method.factored and self.based)
        if not weights:
            if not self.based:
                raise OptionError(f"{method.chain} merges changes from a base: give {option('base')}")
            return self.reader, False
        if not self.based:
            return self.reader, True
        if method.rescales not in self._weights:  # which needs the base's values too
            plan = self._make_plan(method, self.inputs.models)
            self._weights[method.rescales] = ModelReader(plan, self.device, self._room)
        return self._weights[method.rescales], True

    def _make_plan(self, method: Method, models: Sequence[str]) -> Plan:
        return make_plan(merge_recipe(list(models), method, _options_for(method, self._model_options)))

    def _written_plan(self, candidate: MergeCandidate) -> Plan:
        key = str(candidate.chain), candidate.models
        if key not in self._plans:
            self._plans[key] = plan_for(self.inputs.recipe(candidate), None)
        return self._plans[key]

    def _rank(self, candidate: MergeCandidate) -> int:
        """Return the rank of the adapter that a candidate is written as; 0 where it is not cut to one."""
        if not self.adapter_written:
            return 0
        plan = self._written_plan(candidate)
        return 0 if plan.sized is not None else plan.rank


def _split_scale(candidate: MergeCandidate, method: Method) -> tuple[Method | None, Any]:
    """Return the method at scale 1, and the scale, if its result is proportional to the scale; else None."""
    last = method.links()[-1]
    if "scale" not in type(last).model_fields or method.merge_space == "weights":
        return None, 1.0
    if method.rescales or not {link.name for link in method.links()} <= _PROPORTIONAL:
        return None, 1.0
    rest = {key: value for key, value in candidate.parameters.items() if key.rpartition(".")[2] != "scale"}
    return chain(str(candidate.chain), {**rest, f"{last.name}.scale": 1.0}), vars(last)["scale"]
