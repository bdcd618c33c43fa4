"""Merges in memory that keep sorted changes and leave out unchanged tensors: the bits of merges that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.engine.model_reader import Room
from merging.engine.sorted_changes import SortedChanges
from merging.errors import MergingError
from merging.maths.delta import Stack
from merging.maths.site import Site

SHAPES = {"a": (40, 30), "unchanged": (50, 20), "b": (7, 11)}
UNCHANGED = ("unchanged",)


def _stacks(seed: int = 0) -> dict[str, Stack]:
    """Changes of three models with many zeros and equal values; the first has none in one tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        values = torch.randn(3, *shape, generator=generator).mul(4).round() / 4
        values[0] *= name != "b"
        found[name] = Stack.of(values * (name != "unchanged"), ["m0", "m1", "m2"])
    return found


def _merge(chain: str, parameters: dict[str, Any], stacks: dict[str, Stack], **kept: Any) -> dict[str, torch.Tensor]:
    sites = {name: Site(name, shape) for name, shape in SHAPES.items()}
    merged = merge_in_memory(
        merging.chain(chain, parameters), sites, lambda name: TensorInputs(stacks[name], None), False, **kept
    )
    return {name: change.dense() for name, change, _ in merged}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"density": [0.1, 0.5, 1.0]}),
    ("ties", {"density": 0.001, "keep_norm": True}),
    ("ties", {"density": 0.7, "scope": "tensor"}),
    ("pcb", {}),
    ("breadcrumbs+ties", {}),
    ("decouple+ties", {"ties.density": 0.4}),
    ("tsv", {}),
]


@pytest.mark.parametrize(("chain", "parameters"), CASES, ids=[f"{n}-{chain}" for n, (chain, _) in enumerate(CASES)])
def test_what_is_kept_has_the_bits_of_a_sweep(chain: str, parameters: dict[str, Any]) -> None:
    stacks, sorted_changes = _stacks(), SortedChanges(Room(1 << 20))
    for _ in range(2):
        whole = _merge(chain, parameters, stacks)
        merged = _merge(chain, parameters, stacks, sorted_changes=sorted_changes, unchanged=UNCHANGED)
        assert list(merged) == ["a", "b"]
        assert all(torch.equal(value, whole[name]) for name, value in merged.items())
        assert not whole["unchanged"].any()


def test_other_densities_read_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts: list[int] = []
    sort = torch.Tensor.sort

    def count(values: torch.Tensor) -> Any:
        sorts.append(len(values))
        return sort(values)

    monkeypatch.setattr(torch.Tensor, "sort", count)
    stacks, sorted_changes = _stacks(), SortedChanges(Room(1 << 20))
    for density in (0.1, 0.2, 0.3):
        merged = _merge("ties", {"density": density}, stacks, sorted_changes=sorted_changes)
        assert all(torch.equal(v, merged[n]) for n, v in _merge("ties", {"density": density}, stacks).items())
    assert len(sorts) == 3  # one for each model


def test_without_room_a_sweep_answers() -> None:
    stacks = _stacks()
    merged = _merge("ties", {}, stacks, sorted_changes=SortedChanges(Room(100)))
    assert all(torch.equal(value, merged[name]) for name, value in _merge("ties", {}, stacks).items())


def test_changes_with_nan_are_refused_as_by_a_sweep() -> None:
    stacks = _stacks()
    stacks["b"].dense()[1, 0, 0] = torch.nan
    with pytest.raises((MergingError, ValueError), match="NaN"):
        _merge("ties", {}, stacks, sorted_changes=SortedChanges(Room(1 << 20)))


def test_no_model_changes_anything() -> None:
    stacks = {name: Stack.of(torch.zeros(2, *shape)) for name, shape in SHAPES.items()}
    sorted_changes = SortedChanges(Room(1 << 20))
    assert not _merge("ties", {}, stacks, sorted_changes=sorted_changes, unchanged=tuple(SHAPES))
    assert not any(value.any() for value in _merge("ties", {}, stacks, sorted_changes=sorted_changes).values())
