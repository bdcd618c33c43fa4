"""Changes for benchmarks of spectral methods, with the singular values of fine-tunes or of noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SPECTRA", "make_changes"]

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "fine-tune": lambda share: (1 + 80 * share) ** -0.6,
    "flat": torch.ones_like,
}


def make_changes(shape: tuple[int, int], models: int, spectrum: str, seed: int = 0) -> list[Tensor]:
    """Return float32 changes ``[m, k]``, half of each the same for all."""
    random = torch.Generator().manual_seed(seed)
    side = 0 if shape[0] < shape[1] else 1
    weights = SPECTRA[spectrum](torch.arange(shape[side]) / shape[side])
    parts = []
    for _ in range(models + 1):
        noise = torch.randn(shape, generator=random)
        order = weights[torch.randperm(shape[side], generator=random)]
        parts.append(noise * (order if side else order[:, None]))
    return [each + parts[0] for each in parts[1:]]
