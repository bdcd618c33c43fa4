"""`merge search`: what it prints, scoring commands that fail, and the strategies of other packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import merging
from merging.cli.main import cli
from merging.errors import InputError, OptionError
from merging.searches.proposers import make_proposer
from support.adapters import QUIRKS

pytestmark = QUIRKS


def _command(labels: Any, files: Path, *words: object) -> Any:
    given = ["search", *labels.full, "--base", labels.base, "-o", files / "out", "--budget", 12, *words]
    return CliRunner().invoke(cli, [str(word) for word in given])


@pytest.mark.exhaustive
def test_the_command_prints_the_winner_and_draws_a_page(
    labels: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("merging.searches.page.find_spec", find_spec)
    data = ("--data", files / "train.jsonl", "--test", files / "test.jsonl", "--strategy", "shrink")
    done = _command(labels, files, *data)
    assert done.exit_code == 0, done.output
    report = json.loads((files / "out" / "search.json").read_text())
    assert f"{report['verdict']}." in done.stdout.splitlines()
    assert "task arithmetic at 1/N" in done.stdout
    page = (files / "out" / "search.html").read_text()
    assert page.count("data:image/svg+xml") == 2
    assert "The best of 12 candidates looks better" in page
    again = _command(labels, files, *data, "--json", "--overwrite", "--quiet")
    assert json.loads(again.stdout).get("rows") == report["rows"], again.stdout
    assert again.stderr == ""


# --- a scoring command ------------------------------------------------------------------------------------------------

SCORE = """
import sys, time
from pathlib import Path
from safetensors.numpy import load_file
value = float(abs(load_file(Path(sys.argv[1]) / "model.safetensors")["classifier.weight"]).sum())
calls = Path(sys.argv[2])
calls.write_text((calls.read_text() if calls.exists() else "") + "x")
number = len(calls.read_text())
{fault}
print("scored", sys.argv[1])
print(value)
"""

FAULTS = """
if number == 8: sys.exit("no room on the GPU")
if number == 9: time.sleep(600)
if number == 12: value = "high"
if number == 13: value = "nan"
"""

MESSAGES = [
    "failed with code 1: no room on the GPU",
    "took more than 15 seconds and was stopped",
    "should print a number in its last line, and printed 'high'",
    "should print a number in its last line, and printed 'nan'",
]


def _score(folder: Path, fault: str = "") -> str:
    script = folder / "score.py"
    script.write_text(SCORE.format(fault=fault))
    return f"{sys.executable} {script} {{}} {folder / 'calls'}"


@pytest.mark.exhaustive
def test_a_command_that_fails_hangs_or_prints_rubbish_is_a_record(labels: Any, tmp_path: Path) -> None:
    made = labels.arguments(tmp_path / "out", candidates=["task_arithmetic:scale=0..2"], budget=13)
    del made["data"], made["test"]
    found = merging.search(**made, score=_score(tmp_path, FAULTS), score_timeout=15.0)
    failed = sorted((row for row in found.report.trials if row.error), key=lambda row: row.number)
    assert len(failed) == 4
    assert all(message in row.error for message, row in zip(MESSAGES, failed, strict=True))
    assert found.report.trials[0].score == max(row.score for row in found.report.trials if row.score is not None)
    assert len((tmp_path / "calls").read_text()) == 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "out", "score.py"]


@pytest.mark.exhaustive
def test_a_command_that_always_fails_ends_the_search(labels: Any, tmp_path: Path) -> None:
    made = labels.arguments(tmp_path / "out", budget=40)
    del made["data"], made["test"]
    with pytest.raises(
        InputError, match=r"all 7 candidates failed, the last one: the scoring command .* code 1: broken"
    ):
        merging.search(**made, score=_score(tmp_path, "sys.exit('broken')"))
    assert len((tmp_path / "calls").read_text()) == 7
    assert not (tmp_path / "out").exists()
    # mended, it goes on
    found = merging.search(**{**made, "budget": 12}, score=_score(tmp_path), resume=True)
    assert not any(row.error for row in found.report.trials)


@pytest.mark.exhaustive
def test_the_best_score_of_a_function_is_found(labels: Any, tmp_path: Path) -> None:
    """The farther from 30 the sum of one weight, the worse; lower is better."""
    from safetensors.torch import load_file

    def distance(model: Path) -> float:
        return abs(
            float(load_file(model / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"][0, 0])
        )

    made = labels.arguments(tmp_path / "out", candidates=["task_arithmetic:scale=0..2"], budget=12, minimize=True)
    del made["data"], made["test"]
    found = merging.search(**made, score=distance)
    scores = [-row.score for row in found.report.trials if row.score is not None and row.name != "base"]
    assert distance(tmp_path / "out") == pytest.approx(min(scores), abs=1e-6)


# --- strategies -------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["shrink", "cma", "tpe"])
def test_proposals_come_near_a_maximum(strategy: Any) -> None:
    def score(point: tuple[float, ...]) -> float:
        return -sum((each - place) ** 2 for each, place in zip(point, (0.3, 0.8), strict=True))

    start = [((0.5, 0.5), score((0.5, 0.5))), ((0.9, 0.1), score((0.9, 0.1)))]
    proposer, best = make_proposer(strategy, start, 0, "a test"), -1.0
    for _ in range(12):
        points = proposer.ask()
        assert all(0 <= each <= 1 for point in points for each in point)
        proposer.observe(points, [score(point) for point in points])
        best = max(best, *map(score, points))
    assert best > -0.01


def test_a_strategy_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from merging.searches.proposers import resolve_strategy

    monkeypatch.setattr("merging.searches.proposers.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs the package optuna: pip install 'merging\[search\]'"):
        resolve_strategy("tpe")
    assert resolve_strategy("auto") == "shrink"


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["cma", "tpe"])
def test_other_strategies_search_the_same(strategy: str, labels: Any, tmp_path: Path) -> None:
    made = labels.arguments(tmp_path / "out", candidates=["task_arithmetic:scale=0..2"], budget=24, strategy=strategy)
    found = merging.search(**made)
    assert found.report.facts["evaluations"] == 24
