"""The engine ray on one machine: the time of a merge by 1, 2 and 4 workers, and their efficiency.

    pip install 'merging[ray]' psutil && python tests/benchmarks/cluster.py

``ray start`` starts a head, and a node of one processor for each worker. Two kinds of work: ``tsv``, decompositions
that the disk does not bound, and ``linear`` with a throttled disk for each node, as of small machines: a control group
for each node limits the rate of its reads, and the inputs are dropped from the system's memory before each merge. Where
the system has no such control groups, a line says so.

Worker processes are started before the time is taken, and the time is of the sweeps over the model: the work of the
program before and after, as syncing the output, is the same on one machine. The least time of all rounds counts.
Processor seconds are of the workers alone. On a machine that other programs share, these say more: they grow where
sharing costs work. Efficiency is the time of one worker, divided by the number of workers and their time. ``possible``
is the most that the processors of this machine allow; with throttled disks they hardly matter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

import merging
from merging.cluster import RayCluster, connect
from merging.engine.threads import cores
from support.ray_cluster import Nodes, start_nodes

WORKERS = (1, 2, 4)
THROTTLE = Path("/sys/fs/cgroup/blkio")


@dataclass
class Row:
    """The least times of one kind of work, and the processor seconds of these merges, by the number of workers."""

    name: str
    bound_by_disk: bool
    wall: dict[int, float] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)

    def add(self, workers: int, wall: float, processor: float) -> None:
        if wall < self.wall.get(workers, float("inf")):
            self.wall[workers], self.processor[workers] = wall, processor

    def lines(self) -> Iterator[str]:
        for workers in WORKERS:
            possible = 1.0 if self.bound_by_disk else min(1.0, cores() / workers)
            efficiency = self.wall[1] / (workers * self.wall[workers])
            yield (
                f"| {self.name} | {workers} | {self.wall[workers]:.1f} s | {self.processor[workers]:.1f} s | "
                f"{efficiency:.2f} | {possible:.2f} |"
            )


def make_models(folder: Path, count: int, matrices: int, width: int) -> list[Path]:
    """Write checkpoints of square matrices."""
    random = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(width, width, generator=random)
            for layer in range(matrices)
        }
        path = folder / f"{width}-{number}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        paths.append(path)
    return paths


def processor_seconds(nodes: Nodes) -> float:
    """Return the processor time of all workers so far."""
    total = 0.0
    for node in nodes.started:
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                    total += sum(process.cpu_times()[:2])
    return total


def measure(row: Row, nodes: Nodes, models: Sequence[Path], method: str, rounds: int, folder: Path) -> None:
    """Merge by one worker on each node but the head."""
    workers = len(nodes.started) - 1
    base, *tuned = models
    options = {} if method == "linear" else {"base": base}
    cluster = RayCluster(address=nodes.address, workers=workers)
    for _ in range(rounds):
        drop_from_memory(models)
        before = processor_seconds(nodes)
        merged = merging.merge(tuned, method=method, output=folder / "out", overwrite=True, engine=cluster, **options)
        row.add(workers, merged.seconds, processor_seconds(nodes) - before)


def drop_from_memory(paths: Sequence[Path]) -> None:
    """Have the system forget the values of files, so that they come from the disk again."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def throttle(nodes: Nodes, folder: Path, rate: int) -> Iterator[bool]:
    """Limit the reads of each node from the disk of a folder, and yield whether the system can."""
    device = folder.stat().st_dev
    groups = [THROTTLE / f"merging-{os.getpid()}-{number}" for number, _ in enumerate(nodes.started)]
    try:
        try:
            for group, node in zip(groups, nodes.started, strict=True):
                group.mkdir()
                limit = f"{os.major(device)}:{os.minor(device)} {rate}"
                (group / "blkio.throttle.read_bps_device").write_text(limit)
                for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                    with suppress(ProcessLookupError):
                        (group / "cgroup.procs").write_text(str(process.pid))
        except OSError as error:
            print(f"the disk cannot be throttled here: {error}")
            yield False
        else:
            yield True
    finally:
        for group in groups:
            with suppress(OSError):
                for pid in (group / "cgroup.procs").read_text().split():
                    with suppress(OSError):
                        (THROTTLE / "cgroup.procs").write_text(pid)
                group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=10_000_000, help="bytes a second that each node reads")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to throttle")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    warnings.simplefilter("ignore")  # the models are random
    rows = [Row("tsv", False), Row(f"linear, disks of {args.rate / 1e6:.0f} MB/s", True)]
    try:
        small, large = make_models(folder, 3, 64, 640), make_models(folder, 3, 48, 1024)
        for workers in WORKERS:
            with start_nodes(0, *[1] * workers) as nodes, connect(RayCluster(address=nodes.address)):
                merging.merge(small, method="linear", output=folder / "out", overwrite=True, engine="ray")
                measure(rows[0], nodes, small, "tsv", args.rounds, folder)
                with throttle(nodes, folder, args.rate) as throttled:
                    if throttled:
                        measure(rows[-1], nodes, large, "linear", args.rounds, folder)
        if not rows[-1].wall:
            rows.pop()
    finally:
        shutil.rmtree(folder)
    print("| work | workers | wall time | processor seconds | efficiency | possible |\n|---|---|---|---|---|---|")
    for row in rows:
        print(*row.lines(), sep="\n")


if __name__ == "__main__":
    main()
