"""The report of a merge: what it changed by tensor, block and kind, each model's part in it, and where time went."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

from merging.display.tables import Displayed
from merging.engine.measures import Measure, Measures
from merging.engine.probe import find_references
from merging.maths.blocks import find_block
from merging.plan import Item, Plan
from merging.plan.stages import all_stages
from merging.report.short_names import short_names
from merging.version import __version__

if TYPE_CHECKING:
    from merging.api.merged import Merged

__all__ = ["Group", "MeasuredTensor", "MergeReport", "make_report"]

_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""A number between the parts of a name, such as the number of a layer or an expert."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MeasuredTensor(Displayed):
    """A merged tensor and its measure.

    Attributes:
        name: its name in the base, or in the models.
        shape: its shape.
        block: the block of the model that it is in.
        kind: its name with ``*`` in place of numbers, which all layers share.
        measure: sums over its elements.
        discarded: the share of the energy of its change that a lower rank discarded, None where none is cut.
        quantization_error: its relative error where it was quantised after the merge, else None.
    """

    name: str
    shape: tuple[int, ...]
    block: str
    kind: str
    measure: Measure
    discarded: float | None = None
    quantization_error: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors with something in common, and the sums over all of their elements."""

    name: str
    tensors: tuple[MeasuredTensor, ...]
    measure: Measure

    @classmethod
    def of(cls, name: str, tensors: list[MeasuredTensor]) -> Group:
        """Return a group of at least one tensor."""
        return cls(name, tuple(tensors), Measure.total(each.measure for each in tensors))

    @property
    def discarded(self) -> float | None:
        """The share of the energy of all changes that lower ranks discarded; None where none is cut."""
        cut = [each for each in self.tensors if each.discarded is not None]
        energy = fsum(each.measure.merged for each in cut)
        return fsum(each.measure.merged * (each.discarded or 0.0) for each in cut) / energy if energy else None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MergeReport(Displayed):
    """The report of a merge.

    Attributes:
        path: the output.
        kind: ``adapter`` or ``model``.
        method: the chain as it is written.
        parameters: the method's parameters that differ from their defaults, by name.
        models: short, distinct names of the models.
        paths: their paths.
        base: the path of the base, None without one.
        changes: whether the models' changes are known. They are not where weights are merged without a base: measures
            are of the merged weights and of the models' differences from them then.
        tensors: the tensors that were measured, in the order of the files.
        others: tensors whose change is not known, as the base does not have them, where changes of others are.
        missing: tensors without a measure: of pieces that a former run merged without a report, or of values that are
            not finite.
        copied: the number of tensors that were copied.
        phases: the seconds of each phase of the merge.
        work: the seconds of all threads together in reading, measuring and writing.
        sources: records of the models that the recipe names, with keys of their content.
        stages: the merges whose outputs are models of this one, by name, with their methods.
        notices: remarks on the merge.
    """

    path: str
    kind: str
    method: str
    parameters: Mapping[str, Any]
    models: tuple[str, ...]
    paths: tuple[str, ...]
    base: str | None
    changes: bool
    tensors: tuple[MeasuredTensor, ...]
    others: tuple[str, ...]
    missing: tuple[str, ...]
    copied: int
    phases: Mapping[str, float]
    work: Mapping[str, float]
    sources: tuple[Mapping[str, Any], ...]
    stages: Mapping[str, str]
    notices: tuple[str, ...]

    @property
    def total(self) -> Group | None:
        """All measured tensors together; None if there is none."""
        return Group.of("all", list(self.tensors)) if self.tensors else None

    @property
    def blocks(self) -> list[Group]:
        """The blocks of the model, from the first to the last."""
        return self._group(lambda each: each.block)

    @property
    def kinds(self) -> list[Group]:
        """The kinds of tensors, those with the largest changes first."""
        return sorted(self._group(lambda each: each.kind), key=lambda group: -group.measure.merged)

    def _group(self, key: Callable[[MeasuredTensor], str]) -> list[Group]:
        groups: dict[str, list[MeasuredTensor]] = {}
        for each in self.tensors:
            groups.setdefault(key(each), []).append(each)
        return [Group.of(name, tensors) for name, tensors in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in plain values, for JSON."""
        total = self.total
        return {
            "version": __version__,
            "path": self.path,
            "kind": self.kind,
            "method": self.method,
            "parameters": dict(self.parameters),
            "models": [{"name": name, "path": path} for name, path in zip(self.models, self.paths, strict=True)],
            "base": self.base,
            "measured": "changes" if self.changes else "differences from the merged weights",
            "total": None if total is None else self._plain(total.measure) | {"discarded": total.discarded},
            "blocks": [self._plain_group(group) for group in self.blocks],
            "kinds": [self._plain_group(group) for group in self.kinds],
            "tensors": [
                {
                    "name": each.name,
                    "shape": list(each.shape),
                    "block": each.block,
                    "kind": each.kind,
                    **self._plain(each.measure),
                    "discarded": each.discarded,
                    "quantization_error": each.quantization_error,
                }
                for each in self.tensors
            ],
            "others": list(self.others),
            "missing": list(self.missing),
            "copied": self.copied,
            "seconds": dict(self.phases),
            "seconds_of_threads": dict(self.work),
            "sources": [dict(each) for each in self.sources],
            "stages": dict(self.stages),
            "notices": list(self.notices),
        }

    def _plain_group(self, group: Group) -> dict[str, Any]:
        count = {"name": group.name, "tensors": len(group.tensors)}
        return count | self._plain(group.measure) | {"discarded": group.discarded}

    def _plain(self, measure: Measure) -> dict[str, Any]:
        sizes = {"elements": int(measure.elements), "norm": measure.norm, "norms": list(measure.norms)}
        if not self.changes:
            return sizes
        return sizes | {
            "relative": measure.relative,
            "cosines": list(measure.cosines),
            "kept": list(measure.kept),
            "shares": list(measure.shares),
            "conflict": measure.conflict,
            "cancelled": measure.cancelled,
            "sampled": int(measure.sampled),
        }


def make_report(
    merged: Merged, plan: Plan, described: Plan, written: Plan, *, measures: Measures, phases: Mapping[str, float]
) -> MergeReport:
    """Return the report of a merge that is done.

    Args:
        merged: the result.
        plan: the plan that was run.
        described: the plan that the output's header describes.
        written: the plan with the ranks that were chosen, without tensors that are left out.
        measures: the measures that were gathered.
        phases: the seconds of each phase.
    """
    results, references = measures.results(), find_references(plan)
    names = {item.site.name for item in written.items} | results.keys()
    items = [item for item in plan.items if item.form != "copy" and item.site.name in names]
    known = {item.site.name for item in items if not plan.weights or item.base or item.site.name in references}
    whole = [item for item in items if _is_whole(item, results.get(item.site.name))]
    shown = [item for item in whole if item.site.name in known] if known else whole
    recipe = described.recipe.to_dict()
    paths = tuple(str(model.path) for model in described.models)
    return MergeReport(
        path=str(merged.path),
        kind=merged.kind,
        method=merged.method,
        parameters=recipe.get("parameters", {}),
        models=tuple(short_names(paths)),
        paths=paths,
        base=None if described.base is None else str(described.base.path),
        changes=bool(known) or not items,
        tensors=tuple(_describe_item(item, results[item.site.name], merged) for item in sorted(shown, key=_order)),
        others=tuple(item.site.name for item in whole if item not in shown),
        missing=tuple(item.site.name for item in items if item not in whole),
        copied=sum(item.form == "copy" for item in plan.items),
        phases=phases,
        work=measures.seconds,
        sources=tuple(each.to_dict() for each in described.sources),
        stages={stage.name: stage.plan.recipe.method.chain for stage in all_stages(plan.stages)},
        notices=merged.notices,
    )


def _is_whole(item: Item, measure: Measure | None) -> bool:
    """Return whether all elements of a tensor were measured."""
    return measure is not None and int(measure.elements) == item.numel


def _describe_item(item: Item, measure: Measure, merged: Merged) -> MeasuredTensor:
    site = item.site
    error = next(
        (merged.quantization_errors[out.name] for out in item.outs if out.name in merged.quantization_errors), None
    )
    return MeasuredTensor(
        name=site.name,
        shape=site.shape,
        block=str(find_block(site.name, site.position)),
        kind=_NUMBER.sub("*", site.name),
        measure=measure,
        discarded=merged.discarded.get(site.name),
        quantization_error=error,
    )


def _order(item: Item) -> tuple[int, Any]:
    """Return a key that sorts tensors by block: those before the blocks first, those behind them last."""
    position = item.site.position
    inside = position.layout or position.stack is not None
    return (1 if inside else 2 if position.after else 0), find_block(item.site.name, position).order
