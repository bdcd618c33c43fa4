"""The plan's promise of memory: what a merge takes at most, with a limit and without, by any number of threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.engine import process_memory, resources
from merging.errors import OptionError
from support.peaks import peak_of
from support.tiny import save

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process takes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and three fine-tunes of 34 MB, in units for several threads."""
    folder = tmp_path_factory.mktemp("models")
    random = torch.Generator().manual_seed(0)
    shapes = {f"layers.{layer}.mlp.up_proj.weight": (4100, 1024) for layer in range(4)}
    base = {name: torch.randn(shape, generator=random).to(torch.bfloat16) for name, shape in shapes.items()}
    tuned = [{name: value.roll(number, 0) for name, value in base.items()} for number in (1, 2, 3)]
    return [str(save(folder / str(number), tensors)) for number, tensors in enumerate([base, *tuned])]


def options(models: list[str], method: str, folder: Path) -> dict[str, Any]:
    base = {} if method == "linear" else {"base": models[0]}
    return {"models": models[1:], "method": method, "output": str(folder / "out.safetensors"), **base}


def check_memory(models: list[str], method: str, threads: int, folder: Path, limited: bool) -> None:
    wanted = options(models, method, folder)
    least = merging.preview(**wanted).memory(threads)
    peak = peak_of(wanted, threads + limited, least if limited else None)
    assert peak.workers == threads
    assert peak.taken <= peak.promised == least, peak


@pytest.mark.parametrize(
    ("method", "threads", "limited"),
    [("ties", 2, True), pytest.param("linear", 8, False, marks=pytest.mark.exhaustive)],
)
def test_the_promise_is_kept(models: list[str], tmp_path: Path, method: str, threads: int, limited: bool) -> None:
    check_memory(models, method, threads, tmp_path, limited)


METHODS = (
    "linear", "ties", "pcb", "sce", "magmax", "consensus", "della", "breadcrumbs", "multislerp", "lines+ties", "do",
    "model_stock", "dare+ties",
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_the_promise_is_kept_by_all(models: list[str], tmp_path: Path, method: str, threads: int) -> None:
    check_memory(models, method, threads, tmp_path, limited=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "side"), [("tsv", 1100), ("iso_cts", 1100), ("iso_cts", 600), ("dop", 600)])
def test_the_promise_is_kept_by_decompositions(tmp_path: Path, method: str, side: int) -> None:
    """In float32 and in float64: the methods that come closest to their promise."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(side, side, generator=random) * 0.7**number for number in range(4)]
    models = [str(save(tmp_path / str(at), {"a.weight": each.bfloat16()})) for at, each in enumerate(values)]
    check_memory(models, method, 1, tmp_path, limited=False)


def test_without_a_limit_half_of_what_is_available(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of many cores does not take more memory than it has; one worker is always let in."""
    plan = merging.preview(**options(models, "ties", tmp_path))
    assert plan.memory(3) - plan.memory(2) == plan.worker_bytes
    for available, workers in ((None, 64), (2 * plan.memory(3), 3), (2 * plan.memory(3) - 2, 2), (1000, 1)):
        monkeypatch.setattr(resources, "available_memory", lambda available=available: available)
        assert resources.workers_within(plan, 64, None) == workers
    with pytest.raises(OptionError, match="is too little"):
        resources.workers_within(plan, 64, plan.memory(1) - 1)
    monkeypatch.undo()
    assert 0 < (process_memory.available_memory() or 0) < 1 << 50
    assert 0 < process_memory.private_memory() < 1 << 40


CONDITIONS: tuple[Any, ...] = (
    {"most": 64, "exact": True}, {"energy": 0.5}, {"energy": 1.0}, {"size": 300_000}, 64
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [{"most": 64}, *CONDITIONS])
def test_the_promise_is_kept_by_extractions(models: list[str], tmp_path: Path, rank: Any) -> None:
    """By approximate and exact decompositions, which are promised where the values decide on one."""
    wanted = {"models": models[1:2], "base": models[0], "method": "passthrough", "kind": "adapter", "rank": rank}
    peak = peak_of({**wanted, "output": str(tmp_path / "out")}, 2)
    assert peak.taken <= peak.promised <= 8 * peak.taken, peak
