"""Sweeps that gather statistics: their finished part is kept whole, and a later run goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merging.engine.sweeps import Sweeps, SweepSnapshot
from merging.maths.order_statistics import Rank
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Sum

TILES = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0)).split(50_000, 1)
KINDS = {"sum": Sum(), "median": OrderStatistics((Rank.share(0.5), Rank.share(0.9)))}


def start(period: float | None = 0) -> Sweeps:
    sweeps = Sweeps([*KINDS], [kind.start() for kind in KINDS.values()])
    sweeps.period = period
    return sweeps


def feed(sweeps: Sweeps, stop_after: int | None = None) -> bool | None:
    """Go through the tiles that are left, with two threads' parts; None when stopped, else as `end_sweep`."""
    parts = [sweeps.start_part(), sweeps.start_part()]
    for number, tile in sweeps.split(TILES)[1][:stop_after]:
        part = parts[number % 2]
        for accumulator in part.accumulators:
            accumulator.add(tile, number)
        sweeps.add(part, number)
    if stop_after is not None:
        return None
    sweeps.take(parts)
    return sweeps.end_sweep()


def results(sweeps: Sweeps) -> list[Tensor]:
    while feed(sweeps):
        pass
    return [total.result() for total in sweeps.totals]


@pytest.mark.parametrize("finished", [0, 1])
def test_a_later_run_goes_on(tmp_path: Path, finished: int) -> None:
    sweeps = start()
    for _ in range(finished):
        assert feed(sweeps)
    feed(sweeps, 5)
    snapshot = sweeps.take_snapshot()
    assert snapshot is not None and snapshot.sweep == finished and snapshot.done == [0, 1, 2, 3, 4]
    assert sweeps.take_snapshot() is None  # nothing new
    snapshot.write(tmp_path / "merge.sweep")
    feed(sweeps, 2)  # what comes later is not in it
    again = start()
    found = SweepSnapshot.read(tmp_path / "merge.sweep")
    assert found is not None
    again.resume(found)
    assert again.number == finished and [number for number, _ in again.split(TILES)[1]] == [5, 6, 7]
    for ours, whole in zip(results(again), results(start(None)), strict=True):
        assert torch.equal(ours, whole)
    assert again.take_snapshot() is None  # the statistics are there


def test_values_are_handed_in_after_a_while() -> None:
    sweeps = start(period=60)
    feed(sweeps, 5)
    assert sweeps.take_snapshot() is None


def test_no_snapshot_has_the_units_of_a_batch_without_all_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of another process has a part for each thread, and one list of units."""
    sweeps = start()
    parts = [sweeps.start_part(), sweeps.start_part()]
    for part, tile in zip(parts, TILES, strict=False):
        for accumulator in part.accumulators:
            accumulator.add(tile, 0)
    released: list[tuple[int, int]] = []

    class Lock:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            released.append((len(sweeps._done), sweeps.totals[1].count))  # type: ignore[attr-defined]

    monkeypatch.setattr(sweeps, "_lock", Lock())
    sweeps.take(parts, [0, 1])
    assert released == [(2, 100_000)]


def test_other_statistics_are_not_gone_on_with() -> None:
    sweeps = start()
    feed(sweeps, 5)
    snapshot = sweeps.take_snapshot()
    assert snapshot is not None
    other = Sweeps(["mean", "median"], [kind.start() for kind in KINDS.values()])
    other.resume(snapshot)
    assert len(other.split(TILES)[1]) == len(TILES)


@pytest.mark.parametrize("length", [0, 1, 100, -30, None])
def test_a_damaged_file_is_none(tmp_path: Path, length: int | None) -> None:
    sweeps, path = start(), tmp_path / "merge.sweep"
    feed(sweeps, 5)
    snapshot = sweeps.take_snapshot()
    assert snapshot is not None
    snapshot.write(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:length])
    assert SweepSnapshot.read(path) is None
    assert SweepSnapshot.read(tmp_path / "none") is None
