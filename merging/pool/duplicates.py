"""Duplicates: the same bytes, or the same change up to scale. Sketches suspect pairs, and exact cosines decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from merging.hub.open_model import open_model
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import torch
from merging.maths.linalg import inner_product, squared_norm
from merging.maths.sums import safe_ratio
from merging.plan.names.resolve import Resolver
from merging.pool.audit import change_of
from merging.pool.entry import Entry, Finding
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change

__all__ = ["SAME", "cosine", "duplicates"]

SAME = 0.9999
"""The smallest cosine of two changes that count as the same."""

_SUSPECTED = 0.99
_BLOCK = 1024


def duplicates(pool: Path, base: Checkpoint, entries: Sequence[Entry]) -> dict[str, Finding]:
    """Return a finding for each adapter that repeats an earlier one.

    ``entries`` are in order of preference. Sketches are compared by blocks, and only suspected pairs are read: the
    exact cosine of their factors decides.
    """
    found: dict[str, Finding] = {}
    first: dict[str, str] = {}
    for entry in entries:
        if entry.sha256 in first:
            reason = f"has the same content as {first[str(entry.sha256)]}"
            found[entry.name] = Finding("duplicates", "quarantined", reason)
        first.setdefault(str(entry.sha256), entry.name)
    left = [entry for entry in entries if entry.name not in found and entry.sketch and entry.norm]
    resolver = Resolver(base.tensors, base.config)

    def changes(entry: Entry) -> dict[str, Change]:
        opened = open_model(entry.place(pool))
        assert isinstance(opened, Adapter)
        return resolver.resolve(opened).changes

    for one, other in _suspect_pairs(left):
        if left[one].name in found or left[other].name in found:
            continue
        value = cosine(changes(left[one]), changes(left[other]), base)
        if abs(value) > SAME:
            reason = f"is {left[one].name} again (cosine {value:.6f} of their changes)"
            found[left[other].name] = Finding("duplicates", "quarantined", reason)
    return found


def _suspect_pairs(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Yield pairs whose sketches have nearly the same direction, the earlier first."""
    if len(entries) < 2:
        return
    sketches = torch.stack([torch.frombuffer(bytearray(entry.sketch or b""), dtype=torch.float64) for entry in entries])
    sketches = torch.nn.functional.normalize(sketches, dim=1)
    for start in range(0, len(sketches), _BLOCK):
        close = (sketches[start : start + _BLOCK] @ sketches.mT).abs() > _SUSPECTED
        for row, column in close.nonzero().tolist():
            if start + row < column:
                yield start + row, column


def cosine(one: dict[str, Change], other: dict[str, Change], base: Checkpoint) -> float:
    """Return the cosine of two adapters' changes over the whole model, computed on their factors where possible."""
    product = squares = others = 0.0
    for name in sorted(one.keys() | other.keys()):
        stored = base.tensors[name]
        left, right = (change_of(each[name], stored) if name in each else None for each in (one, other))
        squares += float(squared_norm(left)) if left is not None else 0.0
        others += float(squared_norm(right)) if right is not None else 0.0
        if left is not None and right is not None:
            product += _product(left, right)
    return safe_ratio(product, math.sqrt(squares * others))


def _product(left: Delta, right: Delta) -> float:
    if isinstance(left, LowRank) and isinstance(right, LowRank) and left.up.dim() == right.up.dim() == 2:
        return float(inner_product(left, right))
    return float((left.dense().double() * right.dense().double()).sum())
