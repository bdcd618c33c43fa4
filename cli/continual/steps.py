"""Figures of a step as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merging.continual.manifest import StepRecord

__all__ = ["describe_step"]


def describe_step(step: StepRecord) -> str:
    """Return the figures of a step on one line."""
    rank = f", rank {step.rank}" if step.rank else ""
    lost = f", {step.discarded:.1%} of a tensor's energy discarded at worst" if step.discarded > 5e-4 else ""
    return f"norm {step.norm:.4g}, kept {step.kept:.1%}, cosine {step.cosine:+.3f}, merge {step.merged:.4g}{rank}{lost}"
