"""Buffers that threads use again and again: poisoned after use, under debugging allocators, bytes stay the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.engine.outputs import Output
from merging.engine.pieces import _Piece
from merging.engine.probe import Probe
from merging.engine.tiles import Tile, Tiler
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter
from support import stress, tiny
from support.paths import ROOT

DEBUG = {
    "PYTHONMALLOC": "debug",
    "MALLOC_PERTURB_": "165",
    "MALLOC_CHECK_": "3",
    "LD_PRELOAD": "libc_malloc_debug.so.0",  # of glibc: without it MALLOC_CHECK_ says nothing
}
THREADS = 24
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.checkpoint(folder, 3, layers=3, width=64, vocab=100)
    tiny.adapters(folder / "loras", 2)
    return folder


def run(folder: Path, threads: int, mode: str, **environment: str) -> dict[str, str]:
    """The digests of all cases in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.stress", str(folder), str(threads), mode],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "malloc" not in done.stderr and "LD_PRELOAD" not in done.stderr, done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="the debugging allocator is glibc's")
def test_disturbed_threads_write_the_same_bytes(folder: Path) -> None:
    """Many more threads than cores, which change places at every instruction; freed and used memory is overwritten."""
    plain = run(folder, 1, "plain")
    assert len(set(plain.values())) == len(stress.CASES)
    for _ in range(ROUNDS):
        assert run(folder, THREADS, "disturbed", **DEBUG) == plain


def test_values_that_are_gone_are_poison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that held on to a tile, or a writer to values, would use NaN: the test above would fail."""
    for place, name in ((Tiler, "_buffer"), (Probe, "_buffer"), (TensorWriter, "write"), (_Piece, "begin")):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back at the end
    stress.poison_buffers()
    monkeypatch.setattr("merging.engine.tiles.TILE", stress.TILE)
    read, write, held = Tiler.tiles, Output.write, 0

    def check_former(self: Tiler, *arguments: Any) -> Iterator[Tile]:
        nonlocal held
        former: Tile | None = None
        for tile in read(self, *arguments):
            if former is not None:
                assert former.stack.dense().isnan().all()
                held += 1
            yield tile
            former = tile

    def check_written(self: Output, out: OutputTensor, values: Tensor, start: int = 0) -> None:
        write(self, out, values, start)
        assert self.tiler._buffers["out", torch.float32][: values.numel()].isnan().all()

    monkeypatch.setattr(Tiler, "tiles", check_former)
    monkeypatch.setattr(Output, "write", check_written)
    models = [folder / f"tuned{number}" for number in range(2)]
    merging.merge(models, method="linear", output=folder / "checked", overwrite=True)
    assert held > 20
