"""What checkpoints hold."""

from __future__ import annotations

import torch

from merging.sources.checkpoint import Checkpoint

__all__ = ["values"]


def values(opened: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of an opened checkpoint."""
    return {name: stored.read() for name, stored in opened.tensors.items()}
