"""Several devices, and devices that lack something: on stand-in GPUs, since none is needed here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import merging
from merging.engine import devices, tiles
from merging.engine.resources import pick_device, pick_devices
from merging.engine.threads import share_out
from merging.errors import OptionError
from merging.methods import chain
from support.stand_in_devices import StandInKind
from support.tiny import checkpoint, identical, load

METHODS: dict[str, dict[str, object]] = {
    "linear": {}, "ties": {"density": 0.4}, "slerp": {"t": 0.3}, "tsv": {}, "lines+slerp": {}
}  # fmt: skip
Register = Callable[[StandInKind], StandInKind]


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether tensors are the same within rounding."""
    assert one.keys() == other.keys()
    return all(bool((one[n].double() - other[n].double()).abs().max() <= 1e-5) for n in one)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Return a function that makes stand-in GPUs known. Tensors are cut so small that there is work for several."""
    monkeypatch.setattr(tiles, "GPU_TILE", 1 << 11)

    def add(kind: StandInKind) -> StandInKind:
        monkeypatch.setitem(devices.KINDS, "lazy", kind)
        return kind

    return add


@pytest.mark.parametrize("method", METHODS)
def test_gpus_share_a_merge(tmp_path: Path, register: Register, method: str) -> None:
    """The bytes are the same for one GPU and for three, and all of them work."""
    base, paths = checkpoint(tmp_path, 2)
    for name, used in {"lazy:0": [0], "lazy:2,1": [1, 2], "lazy": [0, 1, 2], "cpu": []}.items():
        kind = register(StandInKind(3))
        chosen = chain(method, METHODS[method])
        merging.merge(paths, method=chosen, base=base, output=tmp_path / name, device=name, threads=6)
        assert sorted(device.index for device in kind.used) == used
    assert identical(load(tmp_path / "lazy:0"), load(tmp_path / "lazy"))
    assert identical(load(tmp_path / "lazy:0"), load(tmp_path / "lazy:2,1"))
    assert agree(load(tmp_path / "lazy"), load(tmp_path / "cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_without_float64(tmp_path: Path, register: Register, method: str) -> None:
    """Steps in float64 are done on the CPU, the others on the device."""
    base, paths = checkpoint(tmp_path, 2)
    kind = register(StandInKind(float64=False))
    chosen = chain(method, METHODS[method])
    for device in ("cpu", "lazy"):
        merging.merge(paths, method=chosen, base=base, output=tmp_path / device, device=device, threads=2)
    assert kind.used[torch.device("lazy", 0)] > 50
    assert agree(load(tmp_path / "lazy"), load(tmp_path / "cpu"))


def test_a_method_of_your_own_without_float64(tmp_path: Path, register: Register) -> None:
    @merging.method("test_wide_mean")
    def wide_mean(deltas: torch.Tensor) -> torch.Tensor:
        return deltas.double().mean(0).float()

    register(StandInKind(float64=False))
    base, paths = checkpoint(tmp_path, 2)
    for device in ("cpu", "lazy"):
        merging.merge(paths, method="test_wide_mean", base=base, output=tmp_path / device, device=device, threads=2)
    assert agree(load(tmp_path / "lazy"), load(tmp_path / "cpu"))


def test_devices_share_units_by_size() -> None:
    """Each has half of the bytes, in order; a device that is done first goes on with the other's."""
    units = [100, 1, 1, 1, 1, 96, 50, 50]
    slow, fast = torch.device("cpu", 0), torch.device("cpu", 1)
    done: dict[torch.device, list[int]] = {slow: [], fast: []}
    begun, others = threading.Event(), threading.Event()

    def work(device: torch.device, unit: int) -> None:
        done[device].append(unit)
        if device == slow:
            begun.set()
            assert others.wait(10)
        else:
            assert begun.wait(10)
            if len(done[fast]) == 7:
                others.set()

    share_out(units, lambda device: device, work, lambda unit: None, threads=2, devices=[slow, fast], size=abs)
    assert done == {slow: [100], fast: [1, 1, 1, 1, 96, 50, 50]}


def test_names_of_devices(register: Register) -> None:
    register(StandInKind(2))
    one, two = torch.device("lazy", 0), torch.device("lazy", 1)
    names = {"cpu": (torch.device("cpu"),), "lazy": (one, two), "lazy:1": (two,), "lazy:1,0": (two, one)}
    assert {name: pick_devices(name) for name in names} == names
    assert pick_devices(torch.device("cpu")) == (torch.device("cpu"),)
    assert pick_device("lazy") == one
    with pytest.raises(OptionError, match="is done by one device: name one GPU"):
        pick_device("lazy:0,1")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("abacus", "use cpu, cuda, cuda:N, cuda:N,M, mps, xpu or auto"),
        ("meta", "use cpu, cuda"),
        ("xpu", "this machine has no such GPU, or this torch does not support it: use cpu or auto"),
        ("lazy:2", "this machine has lazy:0 to lazy:1: use these"),
        ("lazy:0,7", "this machine has lazy:0 to lazy:1"),
        ("lazy:-1", "this machine has lazy:0 to lazy:1"),
        ("lazy:0,0", "a GPU is named twice"),
        ("lazy:", "name GPUs by their numbers, as in lazy:0,1"),
        ("lazy:a", "name GPUs by their numbers"),
        ("cpu:1", "this machine has only cpu:0"),
    ],
)
def test_devices_that_do_not_exist(register: Register, name: str, told: str) -> None:
    register(StandInKind(2))
    if name == "xpu" and torch.xpu.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(OptionError) as raised:
        pick_devices(name)
    assert str(raised.value).startswith(f"device = {name!r}: ")
    assert told in str(raised.value)
