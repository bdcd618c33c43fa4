"""A merging method of ten lines, offered to ``merge --method`` and ``merging.merge`` by an entry point."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

import merging


@merging.method("trimmed_mean", needs="element", models=(3, None))
def trimmed_mean(
    deltas: Tensor,
    *,
    trim: Annotated[int, Field(ge=1), "how many of the largest and of the smallest changes are left out"] = 1,
    scale: Annotated[float, "what the mean is multiplied by"] = 1.0,
) -> Tensor:
    """Mean of the changes, entry by entry, without the largest and the smallest."""
    trim = min(trim, (len(deltas) - 1) // 2)
    kept = deltas.sort(dim=0).values[trim : len(deltas) - trim]
    return kept.mean(dim=0) * scale
