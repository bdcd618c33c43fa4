"""Similarity of two adapters over all modules: the scores by which a target LoRA selects its neighbors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import log1p, sqrt

from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor
from merging.maths.linalg import inner_product, squared_norm
from merging.maths.sums import safe_ratio

__all__ = ["SIMILARITIES", "cosine", "similarity"]

_ROWS = 1 << 20

Deltas = Mapping[str, LowRank]
CosineTerms = tuple[float, float, float]
"""Inner product of two changes and the squared size of each: the terms of a cosine."""


def cosine(one: Deltas, other: Deltas) -> float:
    """Return ``<D, D'> / (|D| |D'|)`` over all modules, computed on the factors."""
    return similarity(one, other, "cosine")


def similarity(one: Deltas, other: Deltas, kind: str) -> float:
    """Return the similarity of two adapters, larger for closer ones: one ratio of sums over all modules.

    Args:
        one: The low-rank changes of one adapter by weight.
        other: The changes of the other.
        kind: One of these:

            - ``"cosine"``;
            - ``"clamp"``: negative products of entries count as zero;
            - ``"clamp_pm"``: negative products of modules count as zero;
            - ``"abs"``: absolute values of the products of entries;
            - ``"quasi_fim"``: the root of the cosine of the squared entries;
            - ``"l2"``: ``-log(1 + |D - D'|^2)``.
    """
    names = list(dict.fromkeys([*one, *other]))
    if kind == "l2":
        return -log1p(max(0.0, sum(_distance(one.get(name), other.get(name)) for name in names)))
    found = {name: SIMILARITIES[kind](one[name], other[name]) for name in names if name in one and name in other}
    # A module that only one adapter changes has no product, and counts in that adapter's size.
    sizes = [sum(_size(deltas[name], kind) for name in names if name in deltas) for deltas in (one, other)]
    return _ratio((sum(parts[0] for parts in found.values()), sizes[0], sizes[1]), kind)


def _ratio(parts: CosineTerms, kind: str) -> float:
    ratio = safe_ratio(parts[0], sqrt(parts[1] * parts[2]))
    return sqrt(max(0.0, ratio)) if kind == "quasi_fim" else ratio


def _size(delta: LowRank, kind: str) -> float:
    if kind == "quasi_fim":
        return sum(float(block.square().square().sum()) for block in _blocks(delta))
    return float(squared_norm(delta))


def _distance(one: LowRank | None, other: LowRank | None) -> float:
    if one is None or other is None:
        alone = other if one is None else one
        return 0.0 if alone is None else float(squared_norm(alone))
    return float(squared_norm(one) + squared_norm(other) - 2 * inner_product(one, other))


def _blocks(delta: LowRank) -> Iterator[Tensor]:
    """Yield the product of the factors, some rows at a time, float64."""
    step = max(1, _ROWS // delta.down.shape[1])
    up, down = delta.up.double(), delta.down.double()
    for start in range(0, len(up), step):
        yield up[start : start + step] @ down


def _entries(one: LowRank, other: LowRank, product: Callable[[Tensor, Tensor], Tensor], kind: str) -> CosineTerms:
    total = sum(float(product(a, b).sum()) for a, b in zip(_blocks(one), _blocks(other), strict=True))
    return total, _size(one, kind), _size(other, kind)


def _cosine_terms(one: LowRank, other: LowRank) -> CosineTerms:
    return float(inner_product(one, other)), float(squared_norm(one)), float(squared_norm(other))


def _clamped_terms(one: LowRank, other: LowRank) -> CosineTerms:
    product, *sizes = _cosine_terms(one, other)
    return max(0.0, product), sizes[0], sizes[1]


SIMILARITIES: dict[str, Callable[[LowRank, LowRank], CosineTerms]] = {
    "cosine": _cosine_terms,
    "clamp": lambda one, other: _entries(one, other, lambda a, b: (a * b).clamp(min=0), "clamp"),
    "clamp_pm": _clamped_terms,
    "abs": lambda one, other: _entries(one, other, lambda a, b: (a * b).abs(), "abs"),
    "quasi_fim": lambda one, other: _entries(one, other, lambda a, b: (a * b).square(), "quasi_fim"),
}
"""The terms of each kind of similarity for two changes of one module."""
