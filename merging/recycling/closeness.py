"""How alike two adapters are, module by module: the scores by which a target LoRA picks its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import log1p, sqrt

from torch import Tensor

from merging.maths.delta import LowRank
from merging.maths.linalg import inner, safe_ratio, squared_norm

__all__ = ["CLOSENESS", "closeness", "cosine"]

_ROWS = 1 << 20

Deltas = Mapping[str, LowRank]
Parts = tuple[float, float, float]
"""Product, and squared sizes of the one and the other, whose ratio is a score."""


def cosine(one: Deltas, other: Deltas) -> float:
    """``<D, D'> / (|D| |D'|)`` over all modules, through the factors."""
    return closeness(one, other, "cosine")


def closeness(one: Deltas, other: Deltas, kind: str) -> float:
    """The likeness of two adapters, larger for closer ones: one ratio of sums over all modules.

    ``cosine``; ``clamp`` (products of entries below zero count as zero), ``clamp_pm`` (so do whole modules'),
    ``abs`` (products of absolute values), ``quasi_fim`` (the root of the cosine of the squared entries), ``l2``
    (``-log(1 + |D - D'|^2)``).
    """
    names = list(dict.fromkeys([*one, *other]))
    if kind == "l2":
        return -log1p(max(0.0, sum(_distance(one.get(name), other.get(name)) for name in names)))
    found = {name: CLOSENESS[kind](one[name], other[name]) for name in names if name in one and name in other}
    # what only one side changes has no product, and counts in its size
    sizes = [sum(_size(deltas[name], kind) for name in names if name in deltas) for deltas in (one, other)]
    return _ratio((sum(parts[0] for parts in found.values()), sizes[0], sizes[1]), kind)


def _ratio(parts: Parts, kind: str) -> float:
    ratio = safe_ratio(parts[0], sqrt(parts[1] * parts[2]))
    return sqrt(max(0.0, ratio)) if kind == "quasi_fim" else ratio


def _size(delta: LowRank, kind: str) -> float:
    if kind == "quasi_fim":
        return sum(float(block.square().square().sum()) for block in _blocks(delta))
    return float(squared_norm(delta))


def _distance(one: LowRank | None, other: LowRank | None) -> float:
    if one is None or other is None:
        return float(squared_norm(one or other))  # type: ignore[arg-type]
    return float(squared_norm(one) + squared_norm(other) - 2 * inner(one, other))


def _blocks(delta: LowRank) -> Iterator[Tensor]:
    """The product, some rows at a time, float64."""
    step = max(1, _ROWS // delta.down.shape[1])
    up, down = delta.up.double(), delta.down.double()
    for start in range(0, len(up), step):
        yield up[start : start + step] @ down


def _entries(one: LowRank, other: LowRank, product: Callable[[Tensor, Tensor], Tensor], kind: str) -> Parts:
    total = sum(float(product(a, b).sum()) for a, b in zip(_blocks(one), _blocks(other), strict=True))
    return total, _size(one, kind), _size(other, kind)


def _factored(one: LowRank, other: LowRank) -> Parts:
    return float(inner(one, other)), float(squared_norm(one)), float(squared_norm(other))


def _clamped(one: LowRank, other: LowRank) -> Parts:
    product, *sizes = _factored(one, other)
    return max(0.0, product), sizes[0], sizes[1]


CLOSENESS: dict[str, Callable[[LowRank, LowRank], Parts]] = {
    "cosine": _factored,
    "clamp": lambda one, other: _entries(one, other, lambda a, b: (a * b).clamp(min=0), "clamp"),
    "clamp_pm": _clamped,
    "abs": lambda one, other: _entries(one, other, lambda a, b: (a * b).abs(), "abs"),
    "quasi_fim": lambda one, other: _entries(one, other, lambda a, b: (a * b).square(), "quasi_fim"),
}
"""What is made of two changes of one module."""
