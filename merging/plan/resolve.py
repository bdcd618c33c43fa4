"""Finding each target of an adapter among the base's tensors on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merging.errors import InputError, nearest
from merging.plan.conversion import names_in_memory
from merging.sources import Adapter
from merging.sources.adapter import Change, LoraChange
from merging.sources.names import Renaming, find_renaming
from merging.sources.stored import Stored

__all__ = ["resolve_adapter"]


def resolve_adapter(
    adapter: Adapter, known: Mapping[str, Stored], config: dict[str, Any]
) -> tuple[dict[str, Change], str]:
    """An adapter's changes under the base's names on disk, and a line that tells by what rule they were found.

    The names on disk are tried, then those that transformers gives the same tensors in memory. One target without a
    place is an :class:`~merging.errors.InputError`, never a skip.
    """
    on_disk = {name: name for name in known}
    renaming, left = _match(adapter, known, on_disk)
    if not left:
        return _placed(adapter, known, on_disk, renaming, str(renaming))
    in_memory = names_in_memory(known, config)
    converted, unmatched = _match(adapter, known, in_memory)
    if in_memory and not unmatched:
        return _placed(adapter, known, in_memory, converted, f"transformers' names, {converted}")
    raise _nowhere(adapter, known, renaming, left)


def _match(adapter: Adapter, known: Mapping[str, Stored], names: Mapping[str, str]) -> tuple[Renaming, list[str]]:
    def fits(target: str, match: str) -> bool:
        return adapter.changes[target].fits(known[names[match]].shape)

    return find_renaming(adapter.changes, names, fits)


def _placed(
    adapter: Adapter, known: Mapping[str, Stored], names: Mapping[str, str], renaming: Renaming, rule: str
) -> tuple[dict[str, Change], str]:
    placed = {names[renaming(target) or target]: change for target, change in adapter.changes.items()}
    placed = _oriented(adapter, placed, known)
    return placed, f"{adapter.path}: {len(placed)} of {len(adapter.changes)} targets matched by {rule}"


def _oriented(adapter: Adapter, placed: dict[str, Change], known: Mapping[str, Stored]) -> dict[str, Change]:
    """The changes, square ones turned as all others are where no config says that the model stores ``[in, out]``."""
    linear = {
        name: change for name, change in placed.items() if isinstance(change, LoraChange) and change.kind == "linear"
    }
    turned = {c.is_transposed(known[name].shape) for name, c in linear.items() if c.shape != c.shape[::-1]}
    if "fan_in_fan_out" in adapter.config or turned != {True}:
        return placed
    return placed | {name: replace(change, transposed=True) for name, change in linear.items()}


def _nowhere(adapter: Adapter, known: Mapping[str, Stored], renaming: Renaming, left: list[str]) -> InputError:
    target = left[0]
    match = renaming(target)
    if match is not None and match in known:
        shape = adapter.changes[target].shape
        reason = f"has the shape {shape}, and the base's tensor {tuple(known[match].shape)}"
    else:
        reason = f"is no tensor of the base{nearest(target, known) if len(known) < 5000 else ''}"
    return InputError(
        f"{adapter.path}: {target} {reason} ({len(left)} of {len(adapter.changes)} targets have no place): is this the "
        f"base it was trained on{f' ({adapter.base})' if adapter.base else ''}?"
    )
