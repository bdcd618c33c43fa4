"""Stores that grow model by model: how tests make them, look into them, and drive their commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

import merging
from merging.cli.main import cli
from merging.continual import ContinualStore
from support.tiny import load

__all__ = [
    "PATIENCE",
    "Models",
    "at_once",
    "contents",
    "export",
    "grown",
    "ok",
    "process",
    "run",
    "said",
    "states",
    "unchanged",
    "until",
]

PATIENCE = 60.0


@dataclass(frozen=True)
class Models:
    """A base and what was trained from it. None is changed by a test."""

    base: Path
    tuned: list[Path]


def grown(
    store: Path, models: Models, count: int | None = None, method: str = "opcm", **settings: Any
) -> ContinualStore:
    """A store of the first models."""
    made = ContinualStore.create(store, base=models.base, method=method, **settings)
    for path in models.tuned[:count]:
        assert made.add(path, threads=1)
    return made


def export(store: ContinualStore, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    store.export(output, threads=1, **options)
    return load(output)


def at_once(output: Path, base: Path, tuned: list[Path], method: str, **options: Any) -> dict[str, torch.Tensor]:
    """The batch method."""
    merging.merge(tuned, method=method, base=str(base), kind="model", output=output, threads=1, **options)
    return load(output)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, besides its lock."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
    found.pop(".lock", None)
    return found


def states(store: Path) -> dict[str, bytes]:
    return {name: value for name, value in contents(store).items() if name.startswith("states/")}


@contextmanager
def unchanged(store: Path) -> Iterator[None]:
    """Nothing in a store is another byte afterwards, and nothing was added to it."""
    before, folders = contents(store), sorted(store.rglob("*/"))
    yield
    assert contents(store) == before
    assert sorted(store.rglob("*/")) == folders
    assert ContinualStore(store).verify().problems == []


def run(*words: object) -> Result:
    """Run ``merge continual`` with these words."""
    return CliRunner().invoke(cli, ["continual", *map(str, words)])


def ok(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def said(*words: object, code: int = 1) -> str:
    """What is printed on stderr by words that are refused, as one message."""
    done = run(*words)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    return done.stderr


def process(*words: object) -> subprocess.Popen[str]:
    """``merge continual`` as a process of its own."""
    command = [sys.executable, "-m", "merging", "continual", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(happened: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)
