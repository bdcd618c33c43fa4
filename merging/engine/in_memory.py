"""Merging tensors that are in memory, tensor by tensor: gradients go through the coefficients.

The stages are the same as in a run over files (:mod:`merging.engine.run`, :mod:`merging.engine.worker` and
:mod:`merging.engine.unit`), which cuts tensors and shares them out over threads: change both. Both give the same
result: a law that the tests hold for every method (``tests/laws/test_drivers.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from merging.engine.sorted_changes import SortedChanges
from merging.engine.unit import accumulate, name_failures
from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.reductions import Reduction
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues
from merging.methods.blocks import scale_changes, scales_at
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.contract.places import check_places
from merging.methods.contract.wrapper import Unwrapped, unwrap_outer

__all__ = ["MergedTensor", "TensorInputs", "merge_in_memory"]


class TensorInputs(NamedTuple):
    """The models' changes (or weights) of one tensor, and the base's values, None where there is no base."""

    stack: Stack
    base: Tensor | None


class MergedTensor(NamedTuple):
    """One merged tensor: its name, and its change from ``base``, or its weight where ``base`` is None."""

    name: str
    delta: Delta
    base: Tensor | None


def merge_in_memory(
    method: Method,
    sites: Mapping[str, Site],
    read: Callable[[str], TensorInputs],
    weights: bool,
    *,
    sorted_changes: SortedChanges | None = None,
    unchanged: Collection[str] = (),
) -> Iterator[MergedTensor]:
    """Merge tensors one after the other.

    Args:
        method: the method, with parameters that may differ from site to site.
        sites: the site of each tensor that is merged, by name.
        read: returns the inputs of a tensor by its name; called again for every statistic.
        weights: whether the stacks hold weights, and not changes from the base.
        sorted_changes: the sorted changes that earlier merges of the same inputs left, and that this one may add to.
        unchanged: tensors that no model changes, which are not merged. Statistics of whole models count them.

    Yields:
        The merged tensors, in the order of ``sites``.

    Raises:
        MergingError: for parameters that have no value at some site, and for values that cannot be merged.
    """
    models = len(read(next(iter(sites))).stack) if sites else 0
    check_places(method, sites.values(), models)

    def read_scaled(name: str) -> TensorInputs:
        stack, base = read(name)
        scales = scales_at(method, sites[name], models)
        stack = scale_changes(stack, scales, base if weights else None) if scales else stack
        stack.base = base if method.needs_base else None
        return TensorInputs(stack, base)

    plain = len(method.links()) == 1 and not any(scales_at(method, site, models) for site in sites.values())
    run = _Run(
        method=method,
        sites=sites,
        read=read_scaled,
        weights=weights,
        models=models,
        sorted_changes=sorted_changes if plain and not weights else None,
        unchanged=frozenset(unchanged),
        plain=plain,
    )
    yield from run.merge_all()


@dataclass(kw_only=True)
class _Run:
    method: Method
    sites: Mapping[str, Site]
    read: Callable[[str], TensorInputs]
    weights: bool
    models: int
    sorted_changes: SortedChanges | None
    unchanged: frozenset[str]
    plain: bool
    """Whether the method sees the changes as they are."""

    def merge_all(self) -> Iterator[MergedTensor]:
        """Gather the statistics over the whole model, merge, and scale by the factor of each site."""
        statistics: dict[str, Tensor] = {}
        for each in self.method.required_statistics():
            if each.per == "model":
                statistics[each.name] = self._gather(each, statistics)
        results = self.method.result_statistics(self.models)
        merged = {name: self._merge(name, statistics) for name in self.sites} if results else {}
        for position, result in enumerate(results):
            values = {}
            for name, site in self.sites.items():
                bound = self.method.at(site).result_statistics(self.models)[position]
                change, stack, _ = merged[name]
                values[name] = bound.measure(change, stack, site)
            statistics[result.name] = _reduce(result.reduction, values)
        for name, site in self.sites.items():
            if name in self.unchanged:
                continue
            change, _, base = merged[name] if results else self._merge(name, statistics)
            factor = self.method.at(site).factor(site, statistics, self.models)
            yield MergedTensor(name, change.scaled(factor), base)

    def _gather(self, statistic: Statistic, statistics: Statistics) -> Tensor:
        """Return a statistic of the whole models."""
        if self.sorted_changes is not None:
            found = self.sorted_changes.select(statistic, self.sites, lambda name: self.read(name).stack)
            if found is not None:
                return found
        skipped = self.unchanged if statistic.skips_zeros and self.plain else ()
        names = [name for name in self.sites if name not in skipped] or list(self.sites)
        return _reduce(statistic.reduction, {name: self._measure(name, statistic.name, statistics) for name in names})

    def _measure(self, name: str, statistic: str, statistics: Statistics) -> Tensor | StoredValues:
        """Return what one statistic measures of a tensor, before its reduction."""
        with name_failures(name, self.method):
            unwrapped = self._unwrap(name, self.read(name).stack, statistics)
            bound = next(each for each in unwrapped.then.required_statistics() if each.name == statistic)
            return bound.measure(unwrapped.stack, unwrapped.site, _with_local(unwrapped, statistics, before=statistic))

    def _unwrap(self, name: str, stack: Stack, statistics: Statistics) -> Unwrapped:
        site = self.sites[name]
        return unwrap_outer(self.method.at(site), stack, site, statistics)

    def _merge(self, name: str, statistics: Statistics) -> tuple[Delta, Stack, Tensor | None]:
        """Merge a tensor: its change (or weight), the models' changes (or weights), and the base of the change."""
        stack, base = self.read(name)
        with name_failures(name, self.method):
            unwrapped = self._unwrap(name, stack, statistics)
            local = _with_local(unwrapped, statistics)
            merged = unwrapped.rewrap(unwrapped.then.merge(unwrapped.stack, unwrapped.site, local))
        if not self.weights:
            return merged, stack, base
        if base is None or not self.method.rescales:
            return merged, stack, None
        origin = base
        changes = stack.map(lambda weight: Dense(weight.dense() - origin))
        return Dense(merged.dense() - base), changes, base


def _with_local(unwrapped: Unwrapped, statistics: Statistics, before: str | None = None) -> Statistics:
    """Return the statistics, and with them the statistics of one tensor alone, all or up to ``before``."""
    local = dict(statistics)
    for each in unwrapped.then.required_statistics():
        if each.name == before:
            break
        if each.per == "tensor":
            values = {unwrapped.site.name: each.measure(unwrapped.stack, unwrapped.site, local)}
            local[each.name] = _reduce(each.reduction, values)
    return local


def _reduce(reduction: Reduction, values: Mapping[str, Tensor | StoredValues]) -> Tensor:
    wide = any(value.dtype == torch.float64 for value in values.values())
    accumulator = reduction.widen(torch.float64 if wide else torch.float32).start()
    while True:
        for name, each in values.items():
            accumulate(accumulator, each, name)
        if not accumulator.next():
            return accumulator.result()
