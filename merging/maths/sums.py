"""Sums and ratios that lose nothing that matters."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor

__all__ = ["SPAN", "safe_ratio", "spans"]

SPAN = 1 << 12
"""Elements that are summed at once."""


def safe_ratio(numerator: float, denominator: float) -> float:
    """Return ``numerator / denominator``, and 0 where the denominator is 0: a change of 0 has no size to restore."""
    return numerator / denominator if denominator else 0.0


def spans(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[n, *shape]`` in spans ``[n, s, span]``, and the rest ``[n, r]``.

    Spans are so short that a float32 sum over one loses nothing that matters.
    """
    flat = values.reshape(len(values), -1)
    whole = flat.shape[1] // SPAN * SPAN
    return flat[:, :whole].reshape(len(flat), whole // SPAN, SPAN), flat[:, whole:]
