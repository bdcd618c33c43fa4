"""Bars of progress: ``progress=True`` shows one on stderr, a function is called, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import merging
from merging.display.progress import ProgressBar, resolve_progress
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
