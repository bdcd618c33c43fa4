"""A GPU against the CPU: every method's values, bandwidth, whole merges, and one GPU against several.

    python tests/benchmarks/device.py --output device.md
    python tests/benchmarks/device.py --device cpu --quick

It takes at most six minutes: parts that would take longer are left out, and named. The exit code is 1 if values or
bytes differ that must not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speed import table

import merging
from merging.engine.device_speed import choose_devices, describe_choice
from merging.engine.devices import KINDS, computing_on, kind_of, supply_operations
from merging.engine.resources import pick_devices
from merging.engine.staging import Staging
from merging.maths.delta import LowRank
from merging.maths.order_statistics import Rank
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Reduction, Sum
from support.laws import TABLE, Row
from support.tiny import checkpoint, fine_tune, identical, load, model

CPU = torch.device("cpu")
SPEEDS = ("linear", "task_arithmetic", "ties", "dare", "della", "slerp", "breadcrumbs", "tsv", "iso_c")
"""Methods whose speed is measured."""

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Session:
    """The devices, the time that is left, and the sections of the page."""

    devices: tuple[torch.device, ...]
    quick: bool
    deadline: float
    sections: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def add(self, title: str, heads: list[str], rows: list[list[str]], note: str = "") -> None:
        self.sections.append("\n\n".join(filter(None, [f"## {title}", table(heads, rows) if rows else "", note])))

    def check(self, holds: bool, what: str) -> str:
        if not holds:
            self.failures.append(what)
        return "yes" if holds else "**no**"

    def seconds(self, work: Callable[[], object], device: torch.device) -> float:
        """Return the least time of a few rounds, after one that does not count."""
        found = []
        for _ in range(2 if self.quick or device == CPU else 4):
            began = time.perf_counter()
            work()
            kind_of(device).synchronize(device)
            found.append(time.perf_counter() - began)
        return min(found[1:])


def bandwidth(session: Session) -> float:
    """Measure copies, and return the GB/s that a copy on the device reads and writes."""
    device, kind = session.device, kind_of(session.device)
    count = 1 << (16 if session.quick else 27)
    here, pinned = torch.ones(count), torch.ones(count, pin_memory=kind.pins)
    staging = Staging(device, torch.float32)
    step = max(1, count // 8)
    with torch.inference_mode(), computing_on(device):
        there = here.to(device)
        other = torch.empty_like(there)
        works: dict[str, tuple[Callable[[], object], int]] = {
            "device to device, read and written": (lambda: other.copy_(there), 2),
            "host to device, pinned": (lambda: there.copy_(pinned, non_blocking=kind.pins), 1),
            "host to device, pageable": (lambda: there.copy_(here), 1),
            "memory through two pinned buffers": (
                lambda: [send(staging, here[start : start + step]) for start in range(0, count, step)], 1
            ),
            "device to host, pinned": (lambda: pinned.copy_(there, non_blocking=kind.pins), 1),
        }  # fmt: skip
        speeds = {name: 4e-9 * count * n / session.seconds(work, device) for name, (work, n) in works.items()}
    session.add("Copies", ["copy", "GB/s"], [[name, f"{speed:.1f}"] for name, speed in speeds.items()])
    return next(iter(speeds.values()))


def send(staging: Staging, values: torch.Tensor) -> torch.Tensor:
    buffer = staging.claim(len(values))
    buffer.copy_(values)
    return staging.send(buffer)


def laws(session: Session) -> None:
    """Merge full models and adapters by every method and chain, on the CPU and on the device."""
    rows, chosen = [], TABLE[::12] if session.quick else TABLE
    base = model(3)
    tuned = [fine_tune(base, 3 + number, 0.5) for number in range(2)]
    adapters = [random_adapter(seed) for seed in range(2)]
    for number, row in enumerate(chosen):
        if session.late:
            rows.append([f"{len(chosen) - number} more", "", "", "left out: no time"])
            break
        full = [merge_full(device, row, base, tuned) for device in (CPU, session.device)]
        low = [merge_adapters(device, row, adapters) for device in (CPU, session.device)] if row.on_changes else []
        worst = [difference(*pair) for pair in (full, low) if pair]
        there = {value.device for value in full[-1].values()} == {session.device}
        holds = session.check(max(worst) <= 10 * row.within and there, f"{row} on the device")
        rows.append([str(row), f"{worst[0]:.1e}", f"{worst[1]:.1e}" if low else "", holds])
    heads = ["method", "largest difference", "of adapters", "within rounding"]
    session.add("Every method, CPU against device", heads, rows)


def random_adapter(seed: int) -> dict[str, LowRank]:
    random, shapes = torch.Generator().manual_seed(seed), {"mlp.up_proj": (16, 8), "self_attn.q_proj": (8, 8)}
    adapter = {}
    for layer in range(3):
        for module, (rows, columns) in shapes.items():
            up, down = torch.randn(rows, 2, generator=random), torch.randn(2, columns, generator=random)
            adapter[f"model.layers.{layer}.{module}.weight"] = LowRank(up, down, (rows, columns))
    return adapter


def difference(one: Tensors, other: Tensors) -> float:
    return max(float((one[name].cpu().double() - other[name].cpu().double()).abs().max()) for name in one)


def merge_full(device: torch.device, row: Row, base: Tensors, tuned: list[Tensors]) -> Tensors:
    there = [{name: value.to(device) for name, value in each.items()} for each in (base, *tuned[: row.most])]
    return merging.merge_state_dicts(there[1:], base=there[0], method=row.chain, **row.parameters)


def merge_adapters(device: torch.device, row: Row, adapters: list[dict[str, LowRank]]) -> Tensors:
    there = [{name: delta.to(device) for name, delta in each.items()} for each in adapters[: row.most]]
    merged = merging.merge_deltas(there, method=row.chain, **row.parameters)
    return {name: delta.dense() for name, delta in merged.items()}


def speeds_of_methods(session: Session, copy_speed: float) -> None:
    """Merge resident tensors by each method, on the device and on the CPU."""
    rows: list[list[str]] = []
    for method in SPEEDS:
        if session.late:
            rows.append([method, "", "", "left out: no time"])
            continue
        side = (64 if session.quick else 2048) if method in ("tsv", "iso_c") else (256 if session.quick else 8192)
        shape, count = (side, side), 2
        random = torch.Generator().manual_seed(0)
        models = [{"layers.0.weight": torch.randn(shape, generator=random)} for _ in range(count + 1)]
        taken = []
        for device in (session.device, CPU):
            there = [{name: value.to(device) for name, value in each.items()} for each in models]
            with supply_operations(device):
                taken.append(session.seconds(partial(merge, there, method), device))
        read = 4e-9 * side * side * (count + 1) / taken[0]
        rows.append([method, f"{read:.2f}", f"{read / copy_speed:.1%}", f"{taken[1] / taken[0]:.1f}x"])
    session.add(
        "Methods on tensors that are on the device",
        ["method", "GB/s read", "of a copy", "CPU's time to device's"],
        rows,
        "Two models and their base; one matrix of float32.",
    )


def merge(models: list[Tensors], method: str) -> Tensors:
    return merging.merge_state_dicts(models[1:], base=models[0], method=method)


def statistics(session: Session, copy_speed: float) -> None:
    """Measure statistics over a model, and many small decompositions in one batch."""
    device, rows = session.device, []
    values = torch.randn(2, 1 << (14 if session.quick else 26), generator=torch.Generator().manual_seed(0))
    reductions: dict[str, Reduction] = {
        "sum": Sum(), "order statistic": OrderStatistics((Rank.largest(0.2),), magnitudes=True)
    }  # fmt: skip
    with torch.inference_mode(), computing_on(device):
        there = values.to(device)
        for name, reduction in reductions.items():
            same = torch.allclose(reduce(reduction, there), reduce(reduction, values), rtol=1e-12)
            seconds = session.seconds(partial(reduce, reduction, there), device)
            speed = 1e-9 * values.nbytes * reduction.sweeps / seconds
            equal = session.check(same, f"{name} on the device")
            rows.append([name, f"{speed:.2f} GB/s", f"{speed / copy_speed:.1%} of a copy", equal])
        small = torch.randn(8 if session.quick else 512, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        batch = session.seconds(lambda: torch.linalg.svd(small), device)
        single = session.seconds(lambda: [torch.linalg.svd(each) for each in small], device)
        rows.append([f"{len(small)} SVDs of 64 x 64", f"{batch:.4f} s", f"{single / batch:.1f}x faster in a batch", ""])
    session.add("Statistics and small decompositions", ["work", "speed", "compared", "the CPU's values"], rows)


def reduce(reduction: Reduction, values: torch.Tensor) -> torch.Tensor:
    total = reduction.start()
    while True:
        total.add(values, "values")
        if not total.next():
            return total.result()


def whole_merges(session: Session) -> None:
    """Merge files on the CPU, one device and all devices: seconds, and which bytes are equal."""
    rows, kind = [], session.device.type
    names = ["cpu", f"{kind}:0", kind] if kind != "cpu" else ["cpu"]
    size: dict[str, int] = {"width": 16} if session.quick else {"width": 2048, "vocab": 32000}
    with tempfile.TemporaryDirectory() as root:
        base, paths = checkpoint(Path(root), 2, **size)
        for method in ("linear", "ties", "tsv", "lines+slerp"):
            if session.late:
                rows.append([method, "", "", "", "left out: no time"])
                continue
            outputs: dict[str, Tensors] = {}
            taken = {}
            for name in names:
                given: dict[str, Any] = {"method": method, "base": base, "device": name, "overwrite": True}
                began = time.perf_counter()
                merging.merge(paths, output=Path(root) / "out", **given)
                taken[name], outputs[name] = time.perf_counter() - began, load(Path(root) / "out")
            alone, shared = outputs[names[min(1, len(names) - 1)]], outputs[names[-1]]
            worst = difference(shared, outputs["cpu"])
            equal = session.check(identical(alone, shared), f"{method}: bytes of one and several devices")
            close = session.check(worst < 1e-3, f"{method}: values of files")
            rows.append([method, " / ".join(f"{taken[name]:.2f}" for name in names), f"{worst:.1e}", close, equal])
    heads = ["method", f"seconds: {' / '.join(names)}", "largest difference", "within rounding", "one as several"]
    session.add("Whole merges of files", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", help="cuda, cuda:0,1, mps, xpu or cpu (default: a GPU, else the CPU)")
    parser.add_argument("--quick", action="store_true", help="small tensors and few methods: to try this script")
    parser.add_argument("--seconds", type=float, default=330, help="time after which what is left is left out")
    parser.add_argument("--output", type=Path, help="a file for the page too")
    args = parser.parse_args()
    name = args.device or next((each for each, kind in KINDS.items() if each != "cpu" and kind.count()), "cpu")
    session = Session(pick_devices(name), args.quick, time.perf_counter() + args.seconds)
    chosen = [notice for hard in (False, True) for notice in describe_choice(choose_devices(hard))]
    facts = [f"torch {torch.__version__}, {torch.get_num_threads()} threads", *map(str, session.devices), *chosen]
    session.sections.append("# A GPU against the CPU\n\n" + "\n".join(f"- {fact}" for fact in facts))
    copy_speed = bandwidth(session)
    laws(session)
    whole_merges(session)
    speeds_of_methods(session, copy_speed)
    statistics(session, copy_speed)
    failed = [f"- {each}" for each in session.failures] or ["Nothing differs that must not."]
    session.sections.append("## Failures\n\n" + "\n".join(failed))
    page = "\n\n".join(session.sections) + "\n"
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")
    sys.exit(1 if session.failures else 0)


if __name__ == "__main__":
    main()
