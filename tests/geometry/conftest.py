"""A pool of adapters, which no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.adapter_pool import SHAPES, Factors, factors, write


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Factors]]:
    """Adapters of unequal ranks, one above the dimensions; one is zero, two leave modules out."""
    folder = tmp_path_factory.mktemp("pool")
    first, *_, last = SHAPES
    made = [
        factors(0, 4),
        factors(1, 1),
        factors(2, 45, size=0.2),
        {name: (torch.zeros_like(up), down) for name, (up, down) in factors(3, 4).items()},
        factors(4, 3, [first]),
        factors(5, 2, [name for name in SHAPES if name != first]),
        factors(6, 7, [first, last], size=30.0),
    ]
    return [write(folder / f"m{i}", each) for i, each in enumerate(made)], made
