"""TSV-Merge by its paper."""

from __future__ import annotations

import torch
from torch import Tensor

from support.references.spectral import decomposed, polar

__all__ = ["tsv"]


def tsv(tau: Tensor, scale: float = 1.0) -> Tensor:
    """TSV-Merge (2412.00081): the leading directions of each, made orthogonal to those of the others."""
    count = max(1, min(tau.shape[1:]) // len(tau))
    parts = [decomposed(each) for each in tau]
    u = torch.cat([part[0][:, :count] for part in parts], 1)
    s = torch.cat([part[1][:count] for part in parts])
    vh = torch.cat([part[2][:count] for part in parts], 0)
    return scale * polar(u) @ torch.diag(s) @ polar(vh)
