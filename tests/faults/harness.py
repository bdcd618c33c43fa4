"""Common to the harnesses of faults: their options, where they work, and how they choose and count harms.

Imported before torch, since a pool of threads would not outlive a fork.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from saboteur import ERRORS, Ended, command

__all__ = [
    "count_errors",
    "count_names",
    "every_harm",
    "make_parser",
    "renew",
    "report",
    "run_undisturbed",
    "sample_of",
    "sha256",
    "work_folder",
]

Harm = TypeVar("Harm")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all harnesses have."""
    memory = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--calls", type=int, help="harms to each command or stream, at random  [default: all of them]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="most lines about what went wrong")
    parser.add_argument(
        "--folder",
        default=memory if memory.is_dir() else None,
        help="where to work  [default: in memory if possible, since what a kill leaves is the same there]",
    )
    return parser


@contextmanager
def work_folder(args: argparse.Namespace) -> Iterator[tuple[Path, random.Random]]:
    """A folder that is removed in the end, and the random numbers of this run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        yield Path(root), random.Random(args.seed)


def report(name: str, summary: str, problems: Mapping[str, Sequence[str]], most: int, began: float) -> None:
    """Print what went wrong and the summary, and end with exit code 1 if anything went wrong."""
    for kind, lines in problems.items():
        for line in lines[:most]:
            print(f"{kind}: {line}")
        if len(lines) > most:
            print(f"{kind}: and {len(lines) - most} more")
    print(f"{name}: {summary}; {time.perf_counter() - began:.0f} s")
    sys.exit(1 if any(problems.values()) else 0)


def run_undisturbed(*args: Any) -> Ended:
    """Run a command to which no harm is done, and which must succeed."""
    ended = command(*args)
    if ended.code != 0:
        raise SystemExit(f"an undisturbed command failed: {ended.said}")
    return ended


def every_harm(calls: Sequence[str]) -> list[tuple[int, str, str]]:
    """Every error at every call: ``(turn, call, error)``."""
    return [(turn, call, error) for turn, call in enumerate(calls, 1) for error in ERRORS]


def sample_of(harms: list[Harm], count: int | None, chance: random.Random) -> list[Harm]:
    """Return ``count`` of the harms, chosen by ``chance`` and in their order; all of them for None."""
    if count is None:
        return harms
    chosen = chance.sample(range(len(harms)), min(count, len(harms)))
    return [harms[number] for number in sorted(chosen)]


def count_errors(errors: Counter[str]) -> str:
    return ", ".join(f"{name} {errors[name]}" for name in ERRORS)


def count_names(names: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in names.most_common())


def renew(path: Path, template: Path | None = None) -> None:
    """Remove what is at a path, and put a copy of the template there, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if template is not None:
        (shutil.copytree if template.is_dir() else shutil.copyfile)(template, path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
