"""Items whose tensors compiled kernels take as they are stored."""

from __future__ import annotations

from merging.maths.kernels.switch import kernel_types, usable
from merging.maths.lazy_torch import torch
from merging.plan.items import Item
from merging.sources.stored import Stored

__all__ = ["plain_dtype"]


def plain_dtype(item: Item) -> torch.dtype | None:
    """Return the one type of an item's stored tensors; None where kernels cannot merge them as they are stored.

    Adapters, several types, scaled changes, and merges in float64 are computed by torch.
    """
    if not usable() or item.dtype != torch.float32 or not item.numel:
        return None
    stored = [each for each in (*item.inputs, item.base) if each is not None]
    types = {each.dtype if isinstance(each, Stored) else None for each in stored}
    scaled = any(item.scale(slot) != 1 for slot in range(len(item.inputs)))
    dtype = types.pop() if len(types) == 1 else None
    return dtype if dtype in kernel_types() and not scaled else None
