"""The core seconds of a merge by part, for each method, against the limits of the machine.

    python tests/benchmarks/profiling.py --size 0.5
    python tests/benchmarks/profiling.py --size 0.5 --cases ties della pcb

Parts exclude each other: reading (system calls), decoding (to the type of the computation, and the change from the
base), checking (for NaN and infinities), statistics (everything before the merge that is none of the former), the
method, encoding (to the output's type), writing (system calls), and the rest (plan, header, threads). "waiting" is the
clock's time of all threads in which they did not compute: for the disk, for Python's lock, for other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from methods import PEER_CASES, our_cases
from speed import CASES, Bench, Case, import_everything, options, prepare, table

PARTS = ("reading", "decoding", "checking", "statistics", "method", "encoding", "writing", "rest")
THREE = ("a", "b", "c")


class Clock:
    """The core seconds and the waiting of each part; a part inside another one counts for itself alone."""

    def __init__(self) -> None:
        self.cores: defaultdict[str, float] = defaultdict(float)
        self.waiting = 0.0
        self._local = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for a part."""
        outer: list[list[float]] = self._local.__dict__.setdefault("open", [])
        inner = [0.0, 0.0]  # core seconds and clock seconds of the parts inside
        outer.append(inner)
        cores, clock = time.thread_time(), time.perf_counter()
        try:
            yield
        finally:
            cores, clock = time.thread_time() - cores, time.perf_counter() - clock
            outer.pop()
            if outer:
                outer[-1][0] += cores
                outer[-1][1] += clock
            with self._lock:
                self.cores[name] += cores - inner[0]
                self.waiting += max(0.0, (clock - inner[1]) - (cores - inner[0]))

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count every call of a function for a part."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            with self.part(part):
                return function(*arguments, **named)

        setattr(owner, name, counted)


def watch_merges(clock: Clock) -> None:
    """Count the calls that a merge consists of."""
    from merging import os_calls
    from merging.engine.tiles import Tiler
    from merging.engine.worker import Worker

    clock.watch(os_calls, "read_at", "reading")
    clock.watch(os_calls, "write_at", "writing")
    clock.watch(os_calls, "sync", "writing")
    for name in ("_read", "_read_change", "raw"):
        clock.watch(Tiler, name, "decoding")
    clock.watch(Tiler, "_check", "checking")
    clock.watch(Tiler, "outgoing", "encoding")
    clock.watch(Worker, "merge_unit", "method")
    clock.watch(Worker, "gather", "statistics")
    from merging.engine.unit import WorkUnit

    clock.watch(WorkUnit, "statistics", "statistics")


def profile_case(case: Case, folder: Path, output: Path, threads: int) -> dict[str, float]:
    """Merge twice, and return the core seconds of each part of the second merge, and the waiting.

    Compiled code is loaded by the first one, which takes a few hundredths of a second whatever the size.
    """
    merging = import_everything()
    merging.merge(**case.arguments(folder), output=str(output), threads=threads)
    clock = Clock()
    watch_merges(clock)
    began, start = time.process_time(), time.perf_counter()
    merging.merge(**case.arguments(folder), output=str(output), threads=threads, overwrite=True)
    total, seconds = time.process_time() - began, time.perf_counter() - start
    found = {part: clock.cores[part] for part in PARTS}
    found["rest"] = max(0.0, total - sum(clock.cores.values()))
    return found | {"total": total, "waiting": clock.waiting, "seconds": seconds}


def measure_limits(work: Path | None) -> list[list[str]]:
    """Return the speeds of one core of this machine in GB/s, and its largest product in GFLOP/s."""
    torch.set_num_threads(1)
    source, into = torch.ones(2, 1 << 27, dtype=torch.uint8)
    rows = [["copying memory", f"{2 * _speed(lambda: into.copy_(source), len(source)):.1f} GB/s, read and written"]]
    near = torch.ones(1 << 17)
    rows.append(["adding in the cache", f"{12 * _speed(lambda: torch.add(near, near, out=near), 1 << 17):.1f} GB/s"])
    with tempfile.TemporaryFile(dir=work) as file:
        piece = memoryview(bytearray(1 << 21))
        size = 1 << 28

        def write() -> None:
            for start in range(0, size, len(piece)):
                os.pwrite(file.fileno(), piece, start)

        def read() -> None:
            for start in range(0, size, len(piece)):
                os.preadv(file.fileno(), [piece], start)

        rows.append(["writing into the page cache", f"{_speed(write, size):.1f} GB/s"])
        rows.append(["reading from the page cache", f"{_speed(read, size):.1f} GB/s"])
        start = time.perf_counter()
        write()
        os.fsync(file.fileno())
        rows.append(["writing to the disk", f"{size / (time.perf_counter() - start) / 1e9:.1f} GB/s of the clock"])
    square = torch.ones(2048, 2048)
    rows.append(["product of float32 matrices", f"{_speed(lambda: square @ square, 2 * 2048**3):.0f} GFLOP/s"])
    return rows


def _speed(work: Callable[[], object], amount: int, rounds: int = 5) -> float:
    """Return billions of units in a core second, of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return amount / max(min(times), 1e-9) / 1e9


def all_cases() -> dict[str, Case]:
    """The merges of the other benchmarks, and every method with its defaults."""
    return our_cases() | PEER_CASES | CASES


def row_of(name: str, case: Case, found: dict[str, float], folder: Path) -> list[str]:
    """A row of the table."""
    files = [file for each in case.inputs for file in (folder / each).glob("*.safetensors")]
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    cells = [f"{found[part]:.2f}" for part in PARTS]
    return [name, *cells, f"{found['total']:.2f}", f"{found['waiting']:.2f}", f"{gigabytes / found['total']:.2f}"]


def main() -> None:
    """Parse the command line and print the tables."""
    parser: argparse.ArgumentParser = options(__doc__)
    parser.add_argument("--cases", nargs="+", help="these merges alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, folder, output, threads = json.loads(chosen.worker)
        print(json.dumps(profile_case(all_cases()[name], Path(folder), Path(output), threads)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cases = all_cases()
    unknown = set(chosen.cases or ()) - cases.keys()
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(map(repr, cases))}")
    print(table(["limit of one core", "speed"], measure_limits(chosen.work)))
    for size in chosen.size:
        with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
            bench = Bench(Path(folder), None, chosen.threads or 1)
            prepare(bench, size, ("base", *THREE))
            rows = []
            for name, case in cases.items():
                if chosen.cases and name not in chosen.cases:
                    continue
                rounds = []
                for _ in range(chosen.repeats):
                    arguments = json.dumps([name, folder, str(bench.fresh("ours")), bench.threads])
                    command = [sys.executable, __file__, "--worker", arguments]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, env=bench.environment)
                    rounds.append(json.loads(done.stdout))
                middle = sorted(rounds, key=lambda found: found["total"])[len(rounds) // 2]
                rows.append(row_of(name, case, middle, Path(folder)))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
            print(table(["core seconds", *PARTS, "all", "waiting", "GB of inputs a core second"], rows))


if __name__ == "__main__":
    main()
