"""Matching the targets of several adapters without a base, where their files name one module differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merging.errors import InputError, option
from merging.sources import Adapter
from merging.sources.denoisers import partners
from merging.sources.lora_names import normal_name
from merging.sources.unet_names import diffusers_flat

__all__ = ["match_names"]

Key = tuple[str, str]
"""A component, and the normal form of a name in it."""


def match_names(adapters: Sequence[Adapter]) -> list[dict[str, str]]:
    """Return for each adapter the common name of each target: its name in the first adapter with the module.

    Adapters of language models keep their own names: these drift by prefixes that may also distinguish two towers.
    Raises :class:`~merging.errors.InputError` for a file with one module under two names, and for a file that fuses
    what another keeps apart.
    """
    if all(adapter.names_modules for adapter in adapters):
        return [{target: target for target in adapter.changes} for adapter in adapters]
    known: dict[Key, tuple[str, Adapter]] = {}
    common = []
    for adapter in adapters:
        names: dict[str, str] = {}
        own: dict[str, str] = {}
        for target in adapter.changes:
            key = _key(target)
            names[target] = _find(key, known, adapter) or target
            other = own.setdefault(names[target], target)
            if other != target:
                raise InputError(
                    f"{adapter.path}: {other} and {target} are one module under two names: remove one of them"
                )
            _refuse_fused(key, target, known, adapter)
        for target, name in names.items():
            known.setdefault(_key(target), (name, adapter))
        common.append(names)
    return common


def _key(target: str) -> Key:
    component, name = normal_name(target)
    return component, diffusers_flat(name) if component == "denoiser" else name


def _find(key: Key, known: Mapping[Key, tuple[str, Adapter]], adapter: Adapter) -> str | None:
    """Return the common name of a module that an earlier adapter has, under whatever name."""
    component, name = key
    others = ((component, other) for other, same in partners(name).items() if same)
    return next((known[each][0] for each in (key, *others) if each in known), None)


def _refuse_fused(key: Key, target: str, known: Mapping[Key, tuple[str, Adapter]], adapter: Adapter) -> None:
    component, name = key
    for other, same in partners(name).items():
        if not same and (component, other) in known:
            theirs, first = known[component, other]
            raise InputError(
                f"{first.path} has {theirs} where {adapter.path} has {target}: one of the two is a part of the other, "
                f"or has its rows in another order: give the model with {option('base')}, so that both can be matched"
            )
