"""A check of a few values before a merge: whether each checkpoint may be a fine-tune of the base."""

from __future__ import annotations

import math

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.sums import safe_ratio
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.sources import Checkpoint
from merging.sources.stored import Stored

__all__ = ["UNRELATED", "relative_changes", "unrelated_models"]

UNRELATED = 0.5
"""Relative change from which a warning is given: fine-tunes are far below, unrelated models at about 1.4."""

_TENSORS = 64
_ELEMENTS = 1 << 14


def unrelated_models(plan: Plan) -> list[str]:
    """Return a warning for each checkpoint whose change from the base is too large for a fine-tune, with its size."""
    return [
        f"warning: {model.path} differs from the base by {change:.0%} of its norm: is it a fine-tune of "
        f"{plan.base.path}?"
        for model, change in zip(plan.models, relative_changes(plan), strict=True)
        if change > UNRELATED and plan.base is not None
    ]


def relative_changes(plan: Plan) -> list[float]:
    """Return |theta_i - theta_0| / |theta_0| of each checkpoint, from samples of its largest matrices; 0 for adapters.

    At most 64 tensors and 16,384 elements from the middle of each are read, whatever the size of the models.
    """
    matrices = [item for item in plan.items if item.form != "copy" and item.base and len(item.site.shape) > 1]
    sampled = sorted(matrices, key=lambda item: -item.numel)[:_TENSORS]
    return [
        _relative_change(sampled, slot) if isinstance(model, Checkpoint) else 0.0
        for slot, model in enumerate(plan.models)
    ]


def _relative_change(items: list[Item], slot: int) -> float:
    changed = total = 0.0
    for item in items:
        stored = item.inputs[slot]
        if isinstance(stored, Stored) and item.base is not None:
            base = _sample(item.base)
            changed += float((_sample(stored) - base).square().sum())
            total += float(base.square().sum())
    return math.sqrt(safe_ratio(changed, total))


def _sample(stored: Stored) -> Tensor:
    size = min(stored.numel, _ELEMENTS)
    buffer = torch.empty(size, dtype=stored.dtype)
    stored.read_into(buffer, (stored.numel - size) // 2)
    return buffer.double()
