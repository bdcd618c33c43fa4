"""Slerp of single numbers."""

from __future__ import annotations

import torch

import merging


def test_scalars_slerp() -> None:
    merged = merging.merge_state_dicts([{"s": torch.tensor(1.0)}, {"s": torch.tensor(3.0)}], method="slerp")
    assert float(merged["s"]) == 2
