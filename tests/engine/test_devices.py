"""Several devices, and devices that lack something: on stand-in GPUs, since none is needed here."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import merging
from merging.engine import device_speed, devices, tiles
from merging.engine.resources import pick_device, pick_devices, workers_within
from merging.engine.staging import Staging
from merging.engine.threads import share_out
from merging.errors import OptionError
from merging.maths.key_ranges import KeyRange, KeyTally
from merging.methods import chain
from merging.sources.stored import MappedTensor
from support.paths import ROOT
from support.stand_in_devices import StandInKind
from support.tiny import checkpoint, identical, load

METHODS: dict[str, dict[str, object]] = {"ties": {"density": 0.4}, "tsv": {}, "lines+slerp": {}}
Register = Callable[[StandInKind], StandInKind]


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether tensors are the same within rounding."""
    assert one.keys() == other.keys()
    return all(bool((one[n].double() - other[n].double()).abs().max() <= 1e-5) for n in one)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """Return a function that makes stand-in GPUs known. Tensors are cut so small that there is work for several."""
    monkeypatch.setattr(tiles, "GPU_TILE", 1 << 11)
    with ExitStack() as stack:

        def add(kind: StandInKind) -> StandInKind:
            monkeypatch.setitem(devices.KINDS, "lazy", kind)
            stack.enter_context(kind.open_stream(torch.device("lazy", 0)))
            return kind

        yield add


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


def test_one_buffer_is_filled_while_the_other_is_copied(register: Register) -> None:
    """The third read waits for the copy of the first, whose buffer it fills, and for no other."""
    kind = register(StandInKind())
    place = torch.device("lazy", 0)
    stored = MappedTensor(torch.arange(100.0), ("", 0))
    staging = Staging(place, torch.float32)
    with kind.open_stream(place):
        for number in range(5):
            buffer = staging.claim(10 + number)
            stored.read_into(buffer, 10 * number)
            values = staging.send(buffer)
            assert values.device == place
            assert values.tolist() == list(range(10 * number, 11 * number + 10))
            assert kind.events == Counter({"marked": number + 1, "waited for": max(0, number - 1)}) - Counter()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_highest_keys_are_found_on_a_gpu(register: Register, dtype: torch.dtype) -> None:
    """The end of their range is beyond the type of the keys; a search that loses them never ends."""
    register(StandInKind())
    top = torch.iinfo(dtype).max
    keys = torch.tensor([top, 5, top - 3, -7, -top], dtype=dtype)
    for place in ("cpu", "lazy:0"):
        tally = KeyTally(KeyRange(5, top + 1, 0, None))
        tally.add(keys.to(place))
        assert (tally.below, tally.narrow(4, KeyRange(-top - 1, top + 1, 0, 0))) == (2, top)


def test_a_gpu_without_memory(tmp_path: Path, register: Register) -> None:
    """The error says what to do, and nothing is left."""
    base, paths = checkpoint(tmp_path, 2)
    register(StandInKind(room=1 << 6))
    with pytest.raises(OptionError, match=r"^\S+: the GPU has too little memory .*threads=1"):
        merging.merge(paths, method="linear", base=base, output=tmp_path / "out", device="lazy")
    assert not (tmp_path / "out").exists()


def test_workers_that_fit_into_a_gpu(tmp_path: Path, register: Register) -> None:
    base, paths = checkpoint(tmp_path, 2)
    plan = merging.preview(paths, method="ties", base=base)
    places = [torch.device("lazy", 0), torch.device("lazy", 1)]
    for free, workers in ((None, 16), (1 << 40, 16), (3 * plan.worker_bytes + 1, 6), (1, 2)):
        register(StandInKind(2, free=free))
        assert workers_within(plan, 16, None, devices=places) == workers
    assert workers_within(plan, 16, None) == 16


@pytest.mark.parametrize("faster", ["lazy", "cpu"])
def test_auto_takes_the_faster(
    tmp_path: Path, register: Register, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    """By a product for methods that decompose and by an addition for others, each measured once."""
    base, paths = checkpoint(tmp_path, 2)
    measured = []

    def measure(device: torch.device, decomposes: bool) -> float:
        measured.append((device.type, decomposes))
        return 0.001 if (device.type == faster) != decomposes else 0.002

    monkeypatch.setattr(device_speed, "_CHOICES", {})
    monkeypatch.setattr(device_speed, "_measure", measure)
    kind = register(StandInKind(2))
    for number, (method, place) in enumerate((("linear", faster), ("tsv", None), ("linear", faster))):
        kind.used.clear()
        options = {"base": base, "method": method, "output": tmp_path / f"{number}", "device": "auto"}
        merged = merging.merge(paths, **options, threads=2)
        where = place or ("cpu" if faster == "lazy" else "lazy")
        assert bool(kind.used) == (where == "lazy")
        work = "a product of matrices" if method == "tsv" else "an addition, with copies to the GPU and back,"
        (notice,) = (each for each in merged.notices if each.startswith("device auto"))
        assert notice.startswith(f"device auto: computed on {where}: {work} takes ")
    assert sorted(measured) == [("cpu", False), ("cpu", True), ("lazy", False), ("lazy", True)]


def test_measuring(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_speed, "_ELEMENTS", 1 << 10)
    monkeypatch.setattr(device_speed, "_SIDE", 16)
    monkeypatch.setattr(device_speed, "_CHOICES", {})
    kind = register(StandInKind())
    for decomposes in (False, True):
        devices = device_speed.choose_devices(decomposes)
        assert device_speed.describe_choice(devices)
        assert not device_speed.describe_choice(pick_devices("cpu"))
    assert kind.used


def test_auto_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "KINDS", {"cpu": devices.KINDS["cpu"]})
    monkeypatch.setattr(device_speed, "KINDS", devices.KINDS)
    assert pick_devices("auto") == (torch.device("cpu"),)
    assert not device_speed.describe_choice(pick_devices("auto"))


@pytest.mark.exhaustive
def test_the_script_that_measures_devices(tmp_path: Path) -> None:
    page = tmp_path / "device.md"
    script = ROOT / "tests" / "benchmarks" / "device.py"
    subprocess.run([sys.executable, script, "--device", "cpu", "--quick", "--output", page], check=True)
    text = page.read_text(encoding="utf-8")
    parts = ("Copies", "Every method", "Whole merges", "Methods on tensors", "Statistics", "Failures")
    assert all(f"## {part}" in text for part in parts)
    assert text.endswith("Nothing differs that must not.\n")


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
        ("lazy:-1", "name GPUs by their numbers"),
        ("lazy:0,0", "a GPU is named twice"),
        ("lazy:", "name GPUs by their numbers, as in lazy:0,1"),
        ("lazy:a", "name GPUs by their numbers"),
        ("lazy:0,lazy:1", "name GPUs by their numbers"),
        ("xpu:a", "name GPUs by their numbers, as in xpu:0,1"),
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
