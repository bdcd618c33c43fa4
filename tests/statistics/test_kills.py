"""Gathering statistics that is killed part-way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from merging.sources.statistics_file import open_statistics
from support.example_statistics import save_runnable, write_texts
from support.systems import POSIX

pytestmark = [pytest.mark.exhaustive, POSIX]


@pytest.mark.parametrize(
    ("kill", "through"), [("SIGTERM", False), ("SIGKILL", True)], ids=["one model is ended", "a merge is killed"]
)
def test_killed(kill: str, through: bool, tmp_path: Path) -> None:
    """Nothing is at the destination; an end leaves nothing at all, and the next run removes what a kill left."""
    base, tuned = save_runnable(tmp_path, "llama")
    data = str(write_texts(tmp_path / "texts.jsonl", count=4000))
    words = ["stats", str(tuned[0]), "--data", data, "-o", "one.safetensors"]
    if through:
        words = ["stats", *map(str, tuned), "--data", data, "--data", data, "--through-merge", "--base", str(base)]
        words += ["-o", "stats"]
    output = tmp_path / ("stats" if through else "one.safetensors")
    before = set(tmp_path.iterdir())
    many = [sys.executable, "-m", "merging", *words, "--examples", "4000", "--progress", "json"]
    with subprocess.Popen(many, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["done"] >= 1
        assert process.poll() is None
        process.send_signal(signal.Signals[kill])
        said = process.communicate()[1]
    assert process.returncode == (130 if kill == "SIGTERM" else -signal.SIGKILL), said
    assert not output.is_file()
    assert not list(output.glob("*.safetensors"))
    if kill == "SIGTERM":
        assert set(tmp_path.iterdir()) == before
        assert "nothing was written" in said
    subprocess.run([sys.executable, "-m", "merging", *words, "--examples", "2"], cwd=tmp_path, check=True)
    assert set(tmp_path.iterdir()) == {*before, output}
    files = sorted(output.iterdir()) if through else [output]
    assert [path.name for path in files] == (["tuned1.safetensors", "tuned2.safetensors"] if through else [output.name])
    assert all(open_statistics(path).facts["examples"] == 2 for path in files)
