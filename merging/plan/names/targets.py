"""The targets of a merge of adapters, matched to each other or to the tensors of a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merging.errors import InputError, option
from merging.plan.inputs.task_heads import NO_HEADS, TaskHeads
from merging.plan.names.matching import match_names
from merging.plan.names.output_names import TargetRows
from merging.plan.names.resolve import Resolver
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.fused_names import RowRange
from merging.sources.lora_names import normal_name
from merging.sources.stored import Stored

__all__ = ["Targets", "adapter_targets", "common_shape"]


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets that are merged.

    Attributes:
        changes: at each target the changes, one entry an adapter. With a base, targets are its tensors; else they have
            the adapters' own names.
        labels: the name of each target in PEFT's files.
        placed: the rows that each adapter's own targets consist of.
        matched: one line an adapter about how names were matched.
        resolver: finds targets in the base; None without a base.
        heads: stand for heads that no base has.
    """

    changes: dict[str, tuple[Change | None, ...]]
    labels: dict[str, str]
    placed: list[TargetRows]
    matched: list[str]
    resolver: Resolver | None
    heads: TaskHeads = NO_HEADS

    def __iter__(self) -> Iterator[str]:
        """Iterate over names on disk, which show the depth."""
        return iter(self.changes) if self.resolver is None else map(self.resolver.on_disk, self.changes)


def adapter_targets(adapters: Sequence[Adapter], base: Checkpoint | None, heads: TaskHeads = NO_HEADS) -> Targets:
    """Match the targets of adapters. Raises :class:`~merging.errors.InputError` for names that do not fit."""
    resolver = Resolver(_known_tensors(base, adapters), base.config, heads.tensors) if base is not None else None
    if resolver is None:
        common = match_names(adapters)
        named = [
            {names[target]: change for target, change in adapter.changes.items()}
            for names, adapter in zip(common, adapters, strict=True)
        ]
        _refuse_drifted(adapters, named)
        placed: list[TargetRows] = [
            {target: (RowRange(name, 0, (changes[name].shape or (1,))[0]),) for target, name in names.items()}
            for names, changes in zip(common, named, strict=True)
        ]
        matched = []
    else:
        resolved = [resolver.resolve(adapter) for adapter in adapters]
        if not all(each.exact for each in resolved):
            # An adapter is read by programs that hold the base as it is in memory.
            resolved = [resolver.resolve_in_memory(adapter) for adapter in adapters]
        named = [each.changes for each in resolved]
        placed = [each.rows for each in resolved]
        matched = [each.line for each in resolved]
    labels: dict[str, str] = {}
    for each in named:
        for name, change in each.items():
            labels.setdefault(name, change.target)
    changes = {name: tuple(each.get(name) for each in named) for name in labels}
    return Targets(changes=changes, labels=labels, placed=placed, matched=matched, resolver=resolver, heads=heads)


def _known_tensors(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Stored]:
    names = {name for adapter in adapters for name in adapter.changes}
    heads = {name: stored for name in names if (stored := base.lookup(name)) is not None}
    return {**base.tensors, **heads}


def _refuse_drifted(adapters: Sequence[Adapter], named: Sequence[Mapping[str, Change]]) -> None:
    """Refuse adapters that name the same modules under different prefixes, which would not be summed."""
    first = named[0]
    for adapter, changes in zip(adapters[1:], named[1:], strict=True):
        if not first.keys().isdisjoint(changes):
            continue
        for name in changes:
            other = next((o for o in first if o.endswith("." + name) or name.endswith("." + o)), None)
            if other and normal_name(other)[0] == normal_name(name)[0]:  # else they are parts of two models
                raise InputError(
                    f"{adapters[0].path} has {other} where {adapter.path} has {name}: these look like the same module "
                    f"under the names of two library versions: give the base with {option('base')}, so that both can "
                    f"be matched"
                )


def common_shape(name: str, changes: Sequence[Change | None], adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """Return the shape of a tensor as the adapters state it, each at the place of its change.

    Raises :class:`~merging.errors.InputError` where they do not agree.
    """
    first, *others = [(change, adapter) for change, adapter in zip(changes, adapters, strict=True) if change]
    for change, adapter in others:
        if not change.fits(first[0].shape):
            raise InputError(
                f"{name} is {first[0].shape} in {first[1].path} and {change.shape} in {adapter.path}: they were "
                f"trained on bases of different sizes"
            )
    return first[0].shape
