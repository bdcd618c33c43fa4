"""Every method on GPUs without float64, one and three of them: the same bytes, and the CPU's values within rounding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.engine import devices, tiles
from support.laws import Row, on_changes, rows
from support.stand_in_devices import StandInKind
from support.tiny import adapters, checkpoint, fine_tune, identical, load, model, save

pytestmark = pytest.mark.exhaustive


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInKind]:
    """Three stand-in GPUs that lack a decomposition too, with work for each of them."""
    monkeypatch.setattr(tiles, "GPU_TILE", 1 << 11)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # every operation gives up Python's lock, and would wait 5 ms for it
    made = StandInKind(3, float64=False, lacking=(torch.ops.aten.linalg_qr.default,))
    monkeypatch.setitem(devices.KINDS, "lazy", made)
    with made.open_stream(torch.device("lazy", 0)):
        yield made
    sys.setswitchinterval(before)


def hold(folder: Path, row: Row, paths: list[Path], **options: Any) -> None:
    for device in ("cpu", "lazy:1", "lazy"):
        given = {"method": row.chain, **row.parameters, **options, "device": device, "threads": 3}
        merging.merge(paths[: row.most], output=folder / device, **given)
    cpu, one, three = (load(folder / each) for each in ("cpu", "lazy:1", "lazy"))
    assert identical(one, three)
    assert cpu.keys() == one.keys()
    for name, value in cpu.items():
        assert torch.allclose(value.double(), one[name].double(), rtol=row.within, atol=row.within)


@rows
def test_full_checkpoints(row: Row, kind: StandInKind, tmp_path: Path) -> None:
    base = model(3)
    paths = [save(tmp_path / f"{i}", fine_tune(base, 3 + i, 0.5)) for i in range(2)]
    hold(tmp_path, row, paths, base=save(tmp_path / "base", base))
    assert kind.used


@on_changes
def test_adapters(row: Row, kind: StandInKind, tmp_path: Path) -> None:
    """Written into their base, so that whatever full rank a method makes of them is there."""
    base, paths = adapters(tmp_path, 2)
    hold(tmp_path, row, paths, base=base, kind="model")
    assert kind.used


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_types(kind: StandInKind, tmp_path: Path, dtype: str) -> None:
    """Also of values in float64, which are on the CPU throughout."""
    base, paths = checkpoint(tmp_path, 2, dtype=getattr(torch, dtype))
    for device in ("cpu", "lazy"):
        merging.merge(paths, method="ties", density=0.4, base=base, output=tmp_path / device, device=device, threads=3)
    cpu, there = load(tmp_path / "cpu"), load(tmp_path / "lazy")
    for name, value in cpu.items():
        assert torch.allclose(value.double(), there[name].double(), rtol=1e-5, atol=1e-6)


@rows
def test_tensors_in_memory(row: Row, kind: StandInKind) -> None:
    """Tensors that are on a GPU are merged there, and the result is there too."""
    base = model(3)
    tuned = [fine_tune(base, 3 + i, 0.5) for i in range(2)][: row.most]
    wanted = merging.merge_state_dicts(tuned, base=base, method=row.chain, **row.parameters)
    place = torch.device("lazy", 0)
    there = [{name: value.to(place) for name, value in each.items()} for each in (base, *tuned)]
    got = merging.merge_state_dicts(there[1:], base=there[0], method=row.chain, **row.parameters)
    assert kind.used
    assert {value.device for value in got.values()} == {place}
    for name, value in got.items():
        assert torch.allclose(value.cpu().double(), wanted[name].double(), rtol=row.within, atol=row.within)
