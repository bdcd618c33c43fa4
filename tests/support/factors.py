"""Factors of adapters, of many shapes and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from merging.maths.delta import LowRank

__all__ = ["growing_pairs", "low", "modules", "pairs"]


def low(pair: tuple[Tensor, Tensor], transposed: bool = False, shape: tuple[int, ...] | None = None) -> LowRank:
    """The change of a pair of factors, of another shape than its matrix where one is given."""
    plain = pair[0].shape[0], pair[1].shape[1]
    return LowRank(*pair, shape or (plain[::-1] if transposed else plain), transposed)


def pairs(out: int, inputs: int, ranks: Any, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Factors `(up, down)`, of a size of their own each."""
    random = torch.Generator().manual_seed(seed)
    return [
        ((i + 1) * torch.randn(out, r, generator=random) / 50, torch.randn(r, inputs, generator=random))
        for i, r in enumerate(ranks)
    ]


def modules() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Three adapters' factors of several matrices; rank 0 is nothing."""
    made = {
        "equal ranks": pairs(30, 20, (2, 2, 2)),
        "unequal ranks": pairs(20, 31, (1, 5, 2)),
        "more ranks than rows": pairs(12, 20, (9, 7, 5)),
        "more ranks than columns": pairs(20, 12, (12, 12, 12)),
        "one row": pairs(1, 20, (1, 1, 1)),
        "one column": pairs(20, 1, (1, 1, 1)),
        "duplicates": [*pairs(20, 31, (3,)) * 2, *pairs(20, 31, (2,), 1)],
        "all the same": pairs(20, 31, (3,)) * 3,
        "opposite": [*pairs(20, 31, (3,)), (-pairs(20, 31, (3,))[0][0], pairs(20, 31, (3,))[0][1])],
        "zero": pairs(20, 31, (3, 3, 3)),
        "absent": pairs(20, 31, (3, 0, 2)),
        "one alone": pairs(20, 31, (0, 4, 0)),
        "nothing": pairs(20, 31, (0, 0, 0)),
        "redundant factors": [(torch.cat([u, u], 1), torch.cat([d, d], 0)) for u, d in pairs(20, 31, (2, 3, 2))],
        "uneven factors": [(1e-4 * up, 1e5 * down) for up, down in pairs(20, 31, (2, 3, 2))],
    }
    made["opposite"] += pairs(20, 31, (2,), 1)
    made["zero"][1] = (0 * made["zero"][1][0], made["zero"][1][1])
    return made


def growing_pairs(rows: int, columns: int, ranks: Any, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Factors `(up, down)` in float64, each model's the square of its number times as large."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(torch.randn(rows, r, generator=g), torch.randn(r, columns, generator=g)) for r in ranks]
    return [((i + 1) ** 2 * up.double(), down.double()) for i, (up, down) in enumerate(sizes)]
