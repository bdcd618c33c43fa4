"""Merged changes set aside: what comes back is what was put, and nothing of it stays in memory or on the disk."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from merging.engine.spool import Spool
from merging.errors import OutputError
from merging.maths.delta import Dense, LowRank


def test_what_comes_back(tmp_path: Path) -> None:
    """From several threads at once, of any type and shape, and with no name in the folder."""
    spool = Spool(tmp_path)
    random = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (3,), (40, 30), (2, 3, 4)]
    dense = {f"d{i}": torch.randn(shapes[i % 5], generator=random, dtype=torch.float64) for i in range(50)}
    ups, downs = torch.randn(50, 9, 2, generator=random), torch.randn(50, 2, 7, generator=random)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: spool.put(name, Dense(dense[name])), dense))
        list(pool.map(lambda i: spool.put(f"f{i}", LowRank(ups[i], downs[i], (7, 9), transposed=True)), range(50)))
    assert not list(tmp_path.iterdir())
    for name, value in dense.items():
        got = spool.take(name)
        assert isinstance(got, Dense)
        assert torch.equal(got.value, value)
    for i in range(50):
        got = spool.take(f"f{i}")
        assert isinstance(got, LowRank)
        assert torch.equal(got.dense(), (ups[i] @ downs[i]).mT)
    assert spool.take("other") is None
    spool.close()


def test_nothing_stays_in_memory(tmp_path: Path) -> None:
    """Not even the memory behind a view of no elements."""
    spool = Spool(tmp_path)
    up, down = torch.ones(100, 4), torch.ones(4, 100)
    left = [weakref.ref(value.untyped_storage()) for value in (up, down)]
    spool.put("a", LowRank(up, down, (100, 100)))
    del up, down
    gc.collect()
    assert [each() for each in left] == [None, None]
    spool.close()


def test_changes_that_other_processes_wrote_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, tmp_path / "own.spool")
    other = pickle.loads(pickle.dumps(spool))
    other.put("a", Dense(torch.ones(3)))
    other.close()
    synced: list[int] = []
    monkeypatch.setattr("merging.engine.spool.sync", lambda fd: synced.append(os.fstat(fd).st_ino))
    spool.restore(other.places())
    spool.sync()
    assert not synced
    spool.restore(other.places(), written=True)
    spool.sync()
    spool.sync()
    (file,) = tmp_path.glob("own-*.spool")
    assert synced == [file.stat().st_ino]
    spool.close()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be set aside"):
        Spool(tmp_path / "none").put("a", Dense(torch.ones(3)))
