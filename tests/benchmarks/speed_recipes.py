"""Speed of recipes: the recipe path against the command line, and three stages against mergekit-multi, in one run.

    python tests/benchmarks/speed.py --recipes --size 0.5 --mergekit-python peer/bin/python

Everything is a whole process, as a user starts it. The rounds alternate, and the table has the medians. The peak on the
disk is of the output's folder and of all stages, above the inputs.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from speed import Bench, Case

__all__ = ["HEADS", "STAGES", "recipe_rows", "run_recipe"]

STAGES: tuple[dict[str, Any], ...] = (
    {
        "name": "first",
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.4},
    },
    {
        "name": "second",
        "merge_method": "linear",
        "models": [{"model": "first"}, {"model": "base"}],
        "parameters": {"weight": 0.5},
    },
    {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "second"}, {"model": "a"}],
        "parameters": {"weight": 0.5},
    },
)
"""Three stages of two models each, as mergekit-multi reads them."""

HEADS = ["case", "ours", "command line or peer", "ratio", "on the disk", "peer on the disk", "memory"]

INTERVAL = 0.01  # seconds between two looks at the disk


class Peak(threading.Thread):
    """Watches the bytes in folders until it is stopped."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        super().__init__(daemon=True)
        self.folder, self.names, self.highest, self.done = folder, names, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(INTERVAL):
            self.highest = max(self.highest, self.bytes())

    def bytes(self) -> int:
        """The bytes of all files that are not inputs."""
        total = 0
        for path in self.folder.rglob("*"):
            if path.relative_to(self.folder).parts[0] in self.names or not path.is_file():
                continue
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # it was moved into its place meanwhile
                continue
        return total

    def stop(self) -> int:
        """The highest level seen."""
        self.done.set()
        self.join()
        return max(self.highest, self.bytes())


def watched(bench: Bench, work: Callable[[], float]) -> tuple[float, float]:
    """Seconds of some work, and the gigabytes that it has on the disk at most."""
    for name in ("ours", "theirs", "stages", "copy"):
        shutil.rmtree(bench.folder / name, ignore_errors=True)
    peak = Peak(bench.folder, ("base", "a", "b"))
    peak.start()
    seconds = work()
    return seconds, peak.stop() / 1e9


def write_stages(bench: Bench) -> Path:
    """Write the three stages, with the whole paths of the models."""
    names = {name: str(bench.folder / name) for name in ("base", "a", "b")}

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each if key == "name" else place(each) for key, each in value.items()}
        return [place(each) for each in value] if isinstance(value, list) else names.get(value, value)

    path = bench.folder / "stages.yaml"
    path.write_text(yaml.safe_dump_all([{**place(stage), "dtype": "bfloat16"} for stage in STAGES], sort_keys=False))
    return path


def our_recipe(bench: Bench, recipe: Path) -> float:
    """Seconds of ``merge run``."""
    threads = ["--threads", str(bench.threads)] if bench.threads else []
    return bench.run([*bench.our_command(), "run", str(recipe), *threads, "-o", str(bench.fresh("ours"))])[0]


def peer_stages(bench: Bench, recipe: Path) -> float:
    """Seconds of mergekit-multi."""
    script = Path(str(bench.peer)).parent / "mergekit-multi"
    output = ["--out-path", str(bench.fresh("theirs")), "-I", str(bench.folder / "stages"), "--no-lazy"]
    return bench.run([str(script), str(recipe), *output, "--quiet", "--no-copy-tokenizer"])[0]


def run_recipe(merging: Any, recipe: str, output: str, threads: int | None) -> None:
    """Carry out a recipe in this process, for its peak of memory."""
    merging.load_recipe(Path(recipe)).run(output, threads=threads)


def recipe_rows(bench: Bench, cases: dict[str, Case], repeats: int, speed: str) -> list[list[str]]:
    """Return a row for each case, by its command line and by its recipe, and a row for the stages."""
    rows = []
    for name, case in cases.items():
        recipe = bench.peer_config(case)
        pairs = [(bench.ours_whole(case), our_recipe(bench, recipe)) for _ in range(repeats)]
        ratio = statistics.median(by_recipe / by_words for by_words, by_recipe in pairs)
        words, file = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(
            [f"{name}: recipe / command line", f"{file:.2f} s", f"{words:.2f} s", f"{ratio:.2f}", "-", "-", "-"]
        )
    recipe = write_stages(bench)
    ours = [watched(bench, lambda: our_recipe(bench, recipe)) for _ in range(repeats)]
    settings = {"recipe": str(recipe), "output": str(bench.fresh("ours")), "threads": bench.threads}
    measured = json.loads(bench.run([sys.executable, speed, "--worker", json.dumps(settings)])[1])
    seconds, disk = (statistics.median(column) for column in zip(*ours, strict=True))
    memory = f"{measured['peak_private_bytes'] / 1e6:.0f} MB"
    if bench.peer is None:
        return [*rows, ["three stages", f"{seconds:.2f} s", "-", "-", f"{disk:.2f} GB", "-", memory]]
    theirs = [watched(bench, lambda: peer_stages(bench, recipe)) for _ in range(repeats)]
    peer, peer_disk = (statistics.median(column) for column in zip(*theirs, strict=True))
    times = f"{peer / seconds:.1f} times faster"
    rows.append(
        ["three stages", f"{seconds:.2f} s", f"{peer:.2f} s", times, f"{disk:.2f} GB", f"{peer_disk:.2f} GB", memory]
    )
    return rows
