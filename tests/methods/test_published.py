"""Published numbers: each method makes them of the golden adapters, from factors and from full changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from merging.maths.delta import LowRank
from support import references
from support.changes import Q, merged, written
from support.on_models import inner, knots_ties, mean, on_flat, side_by_side
from support.references import GOLDEN, golden_adapters

ALL = [0, 1, 2]
# (row of the table, adapters, method, parameters, reference)
ROWS: Any = [
    (
        f"SCE t={t} {select}",
        ALL,
        "sce",
        {"density": t, "select": select},
        on_flat(references.sce, density=t, select=select),
    )
    for t, select in itertools.product([0.1, 0.5], ["deltas", "weights"])
]
ROWS += [
    ("D_0", [0], "linear", {}, None),
    ("D_0", [0], "passthrough", {}, None),
    ("D_1", [1], "task_arithmetic", {}, None),
    ("D_1", [1], "svd", {"energy": 1.0}, inner(references.svd, energy=1.0)),
    ("D_2", [2], "do", {}, None),
    ("D_2", [2], "wudi", {}, references.wudi),
    ("mean", ALL, "linear", {}, None),
    ("mean", ALL, "knots+linear", {}, mean()),
    ("same w on deltas", ALL, "task_arithmetic", {"weights": (0.5, -0.3, 0.8)}, None),
    ("same w on deltas", ALL, "core", {"weights": (0.5, -0.3, 0.8)}, None),
    ("TIES keep 1", ALL, "ties", {"density": 1.0}, on_flat(references.ties, density=1.0)),
    ("TIES keep 0.2", ALL, "ties", {}, on_flat(references.ties)),
    ("VaRM", ALL, "varm", {}, on_flat(references.varm)),
    ("SCE t=1", ALL, "sce", {"density": 1.0}, on_flat(references.sce, density=1.0)),
    ("KnOTS-TIES keep 1", ALL, "knots+ties", {"density": 1.0}, inner(knots_ties, density=1.0)),
    ("KnOTS-TIES keep 0.2", ALL, "knots+ties", {}, knots_ties),
    ("TSV-M, T=2 (i=0,1), k=2", [0, 1], "tsv", {}, references.tsv),
    ("Iso-C on D_0+D_1, rank-restricted (R=4)", [0, 1], "iso_c", {"scale": 1.0}, inner(references.iso_c, scale=1.0)),
]


@pytest.mark.parametrize(("row", "which", "method", "options", "reference"), ROWS)
def test_published_numbers(row: str, which: list[int], method: str, options: Any, reference: Any) -> None:
    """From factors and from full changes; and the references themselves."""
    adapters = [{Q: LowRank(*golden_adapters()[i], (6, 5))} for i in which]
    found = [merged(inputs, method, **options).view(6, 5) for inputs in (adapters, written(adapters))]
    if reference is not None:
        found.append(reference(side_by_side(written(adapters), Q)))
    for got in found:
        numbers = [float(x) for x in (got.norm(), got.sum(), got[0, 0], got[-1, -1])]
        assert numbers == pytest.approx(GOLDEN[row], abs=6e-7)
