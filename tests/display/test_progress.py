"""Bars of progress: ``progress=True`` shows one on stderr, a function is called, anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import merging
from merging.display.progress import ProgressBar, ProgressEvents, ProgressLines, resolve_progress
from merging.errors import OptionError
from merging.geometry import gram
from support.tiny import adapters, checkpoint

Run = Callable[[Any], object]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Run]:
    """Every public function that takes long."""
    base, full = checkpoint(tmp_path / "full", 2)
    _, lora = adapters(tmp_path / "lora", 2)
    store = merging.ContinualStore.create(tmp_path / "store", base=base)
    store.add(full[1])
    pack = merging.compress(full[0], tmp_path / "pack.safetensors", base=base).path
    return {
        "merge": lambda p: merging.merge(full, method="linear", output=tmp_path / "out", progress=p),
        "compare": lambda p: merging.compare(lora, progress=p, allow_different_bases=True),
        "gram": lambda p: gram(full, base=base, progress=p),
        "compress": lambda p: merging.compress(full[1], tmp_path / "other.safetensors", base=base, progress=p),
        "decompress": lambda p: merging.decompress(pack, tmp_path / "unpacked", base=base, progress=p),
        "add": lambda p: store.add(full[0], progress=p),
        "export": lambda p: store.export(tmp_path / "exported", progress=p),
    }


@pytest.mark.parametrize("name", ["merge", "compare", "gram", "compress", "decompress", "add", "export"])
def test_true_is_a_bar_on_stderr(name: str, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="progress = 'yes': use True"):
        runs[name]("yes")
    assert capsys.readouterr() == ("", "")
    runs[name](True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err


def test_creating_a_store_takes_a_bar(tmp_path: Path) -> None:
    base, _ = checkpoint(tmp_path, 0)
    merging.ContinualStore.create(tmp_path / "store", base=base, progress=True)
    with pytest.raises(OptionError, match="progress"):
        merging.ContinualStore.create(tmp_path / "other", base=base, progress=3)  # type: ignore[arg-type]


def test_bars_begin_again_with_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """A download is followed by the merge, which counts from zero."""
    bar = ProgressBar("merging")
    for done, total in ((0, 10), (10, 10), (5, 20), (20, 20), (4, 8)):
        bar(done, total)
    bar.close()
    printed = capsys.readouterr().err
    assert printed.count("100%") == 2
    assert "4.00/8.00" in printed
    assert repr(bar) == "ProgressBar('merging')"


def test_nothing_is_shown_unless_asked_for() -> None:
    assert resolve_progress(None) is None
    assert resolve_progress(False) is None

    def receive(done: int, total: int) -> None: ...

    assert resolve_progress(receive) is receive


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("merging.display.progress.time.monotonic", lambda: self.now)


def test_a_log_has_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    lines = ProgressLines()
    lines.phase("gathering statistics")
    for second in range(0, 130, 5):
        clock.now = 100.0 + second
        if second == 60:
            lines.phase("merging")
        lines(second * 10**9, 250 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "gathering statistics: 12% of 250.0 GB, 1.0 GB/s, 3 min 40 s left",
        "merging: 24% of 250.0 GB, 1.0 GB/s, 3 min 10 s left",
        "merging: 36% of 250.0 GB, 1.0 GB/s, 2 min 40 s left",
        "merging: 48% of 250.0 GB, 1.0 GB/s, 2 min 10 s left",
    ]


def test_a_short_task_is_no_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines()
    for done in range(11):
        lines(done, 10)
    assert capsys.readouterr().err == ""


def test_programs_get_events(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    events = ProgressEvents("downloading")
    for second, done, total in ((0, 0, 80), (0.5, 20, 80), (1, 40, 80), (2, 80, 80), (3, 10, 10)):
        clock.now = 100.0 + second
        events(done, total)
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(each["done"], each["per_second"], each["seconds_left"]) for each in found] == [
        (40, 40, 1.0),
        (80, 40, 0.0),
        (10, 0, None),
    ]
    assert {each["phase"] for each in found} == {"downloading"}


def test_phases_reach_a_callback_that_has_them(tmp_path: Path) -> None:
    phases: list[str] = []

    class Watch:
        def phase(self, name: str) -> None:
            phases.append(name)

        def __call__(self, done: int, total: int) -> None:
            assert 0 <= done <= total

    base, tuned = checkpoint(tmp_path, 2)
    merging.merge(tuned, method="ties", base=base, output=tmp_path / "out", progress=Watch())
    assert [*dict.fromkeys(phases)] == ["gathering statistics", "merging", "making it durable"]
