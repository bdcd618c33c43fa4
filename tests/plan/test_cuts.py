"""How tensors are cut: by the method, the shape, and what the inputs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.maths.site import Site
from merging.methods import chain
from merging.plan.cuts import Cut, cut_rows, cut_stack, cut_tensor
from support.tiny import fine_tune, model, save


@pytest.mark.parametrize(
    ("method", "kind", "way", "splits"),
    [
        ("linear", "matrix", "elements", True),
        ("arcee_fusion", "matrix", "rows", False),
        ("della+linear", "matrix", "rows", True),
        ("tsv", "matrix", "whole", False),
    ],
)
def test_stored_tensors(method: str, kind: Any, way: str, splits: bool) -> None:
    site = Site("w", (6, 10), kind=kind)
    cut = cut_tensor(site, [None], chain(method), weights=False)
    assert (cut.way, cut.splits) == (way, splits)
    assert cut.granule == {"elements": 1, "rows": 10, "whole": 60}[way]


def test_pieces_have_whole_granules() -> None:
    for granule, size, elements in ((1, 7, 7), (10, 64, 60), (10, 3, 10), (0, 5, 5)):
        assert Cut("rows", granule).elements(size) == elements
    assert cut_rows(5).granule == 64 * 5
    assert cut_rows(5, experts=True).granule == 5


def test_stacks_of_factors_stay_factors_for_methods_that_keep_them() -> None:
    site = Site("w", (6, 10))
    ways = {name: cut_stack(site, True, chain(name)).way for name in ("task_arithmetic", "ties", "tsv")}
    assert ways == {"task_arithmetic": "factors", "ties": "blocks", "tsv": "factors"}


def test_items_of_a_plan_are_cut(tmp_path: Any) -> None:
    base = model(0)
    paths = [save(tmp_path / "base", base), save(tmp_path / "tuned", fine_tune(base, 1))]
    plan = merging.preview(paths[1:], method="tsv", base=paths[0])
    ways = {item.site.kind: item.cut.way for item in plan.items}
    assert ways["matrix"] == "whole"
    assert ways["vector"] == "elements"


def test_memory_of_scalars_next_to_matrices_that_are_decomposed(tmp_path: Any) -> None:
    base = {**model(0), "model.layers.0.gate": torch.tensor(1.0)}
    paths = [save(tmp_path / "base", base), save(tmp_path / "tuned", fine_tune(base, 1))]
    for method in ("decouple+wudi", "orthogonalize+ace"):
        assert merging.preview(paths[1:], method=method, base=paths[0]).memory(1) > 0
