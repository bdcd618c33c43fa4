"""Journals of runs: entries are taken up by a later run, whatever a crash left of the last one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merging.engine.journal import Journal, RunJournal
from merging.maths.delta import Dense, LowRank


@dataclass
class Results:
    """The results of a run, and a sink of nothing."""

    statistics: dict[str, Tensor] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    discarded: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    resumed: bool = True
    credited: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Take nothing."""

    def credit(self, written: dict[str, int]) -> None:
        self.credited = dict(written)

    def sync(self) -> None:
        """Do nothing."""


def begin(folder: Path, results: Results) -> RunJournal:
    journal = Journal(folder, period=60).of_run("merge")
    journal.begin(results, results)
    return journal


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A folder with the journal of a run that finished two units."""
    results = Results()
    journal = begin(tmp_path, results)
    results.statistics["norm"] = torch.tensor([[0.1, float("nan")]], dtype=torch.float64)
    results.statistics["none"] = torch.empty(0, dtype=torch.float64)
    results.discarded["w"] = 1 / 3
    results.metrics["angle"] = {"w": 0.5}
    results.notices.add("a remark")
    journal.spool.put("dense", Dense(torch.arange(6.0).view(2, 3)))
    journal.spool.put("factors", LowRank(torch.ones(4, 1), torch.ones(1, 5), (4, 5), False))
    journal.add(3, {"w": 10})
    journal.add(1, {"w": 2, "v": 4})
    journal.end()
    journal.spool.close()
    return tmp_path


def test_a_later_run_takes_it_up(recorded: Path) -> None:
    results = Results()
    journal = begin(recorded, results)
    assert journal.done == {1, 3}
    assert results.credited == {"w": 12, "v": 4}
    assert results.statistics["norm"].dtype == torch.float64
    assert torch.equal(results.statistics["norm"].nan_to_num(7), torch.tensor([[0.1, 7]], dtype=torch.float64))
    assert results.statistics["none"].shape == (0,)
    assert (results.discarded, results.metrics) == ({"w": 1 / 3}, {"angle": {"w": 0.5}})
    assert results.notices == {"a remark"}
    dense, factors = journal.spool.take("dense"), journal.spool.take("factors")
    assert dense is not None and torch.equal(dense.dense(), torch.arange(6.0).view(2, 3))
    assert isinstance(factors, LowRank) and torch.equal(factors.dense(), torch.ones(4, 5))
    journal.spool.put("later", Dense(torch.full((2,), 9.0)))
    assert torch.equal(journal.spool.take("dense").dense(), dense.dense())
    journal.end()
    journal.spool.close()


def test_only_new_results_are_written(recorded: Path) -> None:
    before = (recorded / "merge.jsonl").read_bytes()
    begin(recorded, Results()).end()
    assert (recorded / "merge.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 40, 10_000])
def test_a_torn_entry_is_none(recorded: Path, cut: int) -> None:
    path = recorded / "merge.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    results = Results()
    journal = begin(recorded, results)
    assert not journal.done
    assert not results.statistics
    journal.add(7, {})
    journal.end()
    again = begin(recorded, Results())
    assert again.done == {7}
    again.end()


def test_a_torn_tail_keeps_the_entries_before(recorded: Path) -> None:
    with (recorded / "merge.jsonl").open("ab") as file:
        file.write(b'{"units": [[9, {}]], "spoo' + b"\0" * 100)
    journal = begin(recorded, Results())
    assert journal.done == {1, 3}
    journal.end()


def test_entries_are_of_no_use_without_the_values(recorded: Path) -> None:
    journal = begin(recorded, Results(resumed=False))
    assert not journal.done
    journal.end()
    assert (recorded / "merge.jsonl").read_bytes() == b""


@dataclass
class EncodedResults(Results):
    """The same, where the tensor ``w`` is encoded when its 12 bytes are there."""

    sizes: dict[str, int] = field(default_factory=lambda: {"w": 12})
    errors: dict[str, float] = field(default_factory=dict)

    def error_of(self, name: str) -> float:
        return 0.1

    def restore_error(self, name: str, error: float) -> None:
        self.errors[name] = error


def test_a_tensor_that_is_encoded_is_recorded_when_it_is_whole(tmp_path: Path) -> None:
    journal = begin(tmp_path, EncodedResults())
    journal.add(0, {"w": 8})
    journal.add(1, {"v": 4})
    journal.end()
    journal = begin(tmp_path, EncodedResults())
    assert journal.done == {1}
    journal.add(2, {"w": 4})
    journal.add(0, {"w": 8})
    journal.end()
    results = EncodedResults()
    journal = begin(tmp_path, results)
    assert journal.done == {0, 1, 2}
    assert results.credited == {"w": 12, "v": 4}
    assert results.errors == {"w": 0.1}
    journal.end()
