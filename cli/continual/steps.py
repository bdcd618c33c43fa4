"""Figures of a step as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merging.continual.manifest import StepRecord

__all__ = ["FIGURES", "REMOVED", "describe_step"]

FIGURES = [
    ("norm", "of the model's change"),
    ("kept", "share of the change that was added"),
    ("cosine", "between the change and the merged changes, after the step"),
    ("rank", "of the factors; - if all tensors are held in full"),
    ("merge", "norm of the merged changes, before an export multiplies them"),
]
"""The figures of a step and their meanings."""

REMOVED = ("*", "the state was removed: rollback cannot go back to this step")
"""The mark of a step whose state was removed, and its meaning."""


def describe_step(step: StepRecord) -> str:
    """Return the figures of a step on one line, each with its meaning."""
    rank = f", of rank {step.rank}" if step.rank else ""
    lost = f", {step.discarded:.1%} of a tensor's energy discarded at worst" if step.discarded > 5e-4 else ""
    return (
        f"change of norm {step.norm:.4g}, {step.kept:.1%} of it added, cosine to the merge {step.cosine:+.3f}, "
        f"merge of norm {step.merged:.4g}{rank}{lost}"
    )
