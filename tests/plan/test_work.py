"""The work that is counted from headers is the work that the engine does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.engine.run import work_bytes
from merging.plan.prediction.work import count_sweeps, count_work, gram_flops
from support.tiny import adapters, fine_tune, model, save

METHODS = ("linear", "task_arithmetic", "ties", "pcb", "lines+tsv", "opcm", "varm", "dare+ties")
SPECTRAL = {
    "tsv": 5,
    "iso_c": 1,
    "iso_cts": 6,
    "svd": 1,
    "wudi": 1,
    "actmat": 1,
    "ace": 1,
    "star": 3,
    "dc_merge": 5,
    "opcm": 2,
    "dop": 4,
}
"""Eigenvalue problems of a matrix for three models; opcm takes the first as it is."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = model(0)
    save(tmp_path / "base", base)
    for number, name in enumerate(("one", "two", "three")):
        save(tmp_path / name, fine_tune(base, number))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_read_are_those_of_the_engine(folder: Path, method: str) -> None:
    plan = merging.preview(["one", "two"], method=method, **({} if method == "linear" else {"base": "base"}))
    per_tensor = any(each.per == "tensor" for each in plan.recipe.method.required_statistics())
    counted = sum(each.read_bytes * each.sweeps for each in count_work(plan))
    assert per_tensor or counted == work_bytes(plan, torch.device("cpu"))
    assert sum(each.written_bytes for each in count_work(plan)) == plan.out_bytes


def test_sweeps_are_counted(folder: Path) -> None:
    assert count_sweeps(merging.chain("linear"), 2) == 1
    assert count_sweeps(merging.chain("ties"), 2) == 4
    assert count_sweeps(merging.chain("opcm"), 2) == 2


@pytest.mark.parametrize("method", SPECTRAL)
def test_decompositions_are_counted(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = merging.preview(["one", "two", "three"], method=method, base="base")
    matrices = [each for each in count_work(plan) if each.decomposition_flops]
    assert len(matrices) == 4  # three layers and the head
    made: list[int] = []
    for name in ("eigh", "svd"):  # of large and of small matrices
        monkeypatch.setattr(torch.linalg, name, _counting(getattr(torch.linalg, name), made))
    merging.merge(["one", "two", "three"], method=method, base="base", output="out", threads=1)
    assert len(made) == SPECTRAL[method] * len(matrices)
    side = "longer" if method in ("wudi", "actmat", "ace", "dop") else "shorter"
    shapes = [(16, 8), (16, 8), (16, 8), (12, 8)]
    one = sum(gram_flops(shape, side) for shape in shapes)
    assert sum(each.decomposition_flops for each in matrices) == merging.chain(method).decompositions(3) * one


def _counting(function: Callable[..., Any], made: list[int]) -> Callable[..., Any]:
    def call(*given: Any, **options: Any) -> Any:
        made.append(1)
        return function(*given, **options)

    return call


def test_adapters_are_counted_by_their_factors(folder: Path) -> None:
    _, lora = adapters(folder / "loras", 2)
    plan = merging.preview(lora, method="tsv")
    assert all(each.core_flops and not each.decomposition_flops for each in count_work(plan))
    assert not any(each.product_flops for each in count_work(plan))
    full = merging.preview(lora, method="ties", rank=2)
    assert all(each.compression_flops and each.product_flops for each in count_work(full))


def test_a_stage_is_counted_as_often_as_it_is_computed(folder: Path) -> None:
    inner = merging.Recipe(models=("one", "two"), method="linear")
    plain = merging.preview(["three", "two"], method="ties", base="base")
    plan = merging.preview(["three", inner], method="ties", base="base")
    stage = merging.preview(["one", "two"], method="linear")
    assert len(count_work(plan)) == len(count_work(plain)) + 4 * len(count_work(stage))
