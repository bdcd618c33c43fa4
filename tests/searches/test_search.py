"""`merging.search`: what it finds and writes, what survives a kill, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.errors import InputError, MergingError, OptionError
from merging.searches.evaluator import Evaluator
from merging.searches.memory_merger import MemoryMerger, MergeInputs
from merging.searches.spaces import MergeCandidate
from support.adapters import QUIRKS
from support.laws import TABLE, Row

pytestmark = QUIRKS


def _contents(folder: Path) -> dict[str, Any]:
    """The files of an output without the seconds."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}
    report = json.loads(found.pop("search.json"))
    for row in [report, *report["trials"]]:
        row.pop("seconds")
    return {**found, "report": report}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_search_writes_the_best_merge_with_its_recipe_and_report(labels: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    found = merging.search(**labels.arguments(tmp_path / "out", budget=16, on_event=lines.append))
    report = json.loads((tmp_path / "out" / "search.json").read_text())
    assert report["evaluations"] == 16
    assert len(lines) == 17  # one for each evaluation, and the writing
    best = max((row for row in report["trials"] if row["complete"] and row["name"] != "base"), key=lambda r: r["score"])
    assert best["score"] == report["winner"]["valid"]
    assert {row["title"] for row in report["rows"]} == {
        "the winner", "base", "best single model", "plain average", "task arithmetic at 1/N", "task arithmetic at 0.3"
    }  # fmt: skip
    assert report["measured_on"] == "test"
    assert found.report.verdict in (tmp_path / "out" / "README.md").read_text()
    assert found.report.verdict in (tmp_path / "out" / "search.html").read_text()
    # the recipe makes the same tensors again
    recipe = merging.load_recipe(tmp_path / "out" / "recipe.yml")
    assert recipe == found.recipe
    recipe.run(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first | again)
    assert not (tmp_path / ".out.search").exists()


@pytest.mark.exhaustive
def test_a_search_finds_a_scale_that_only_one_value_solves(labels: Any, tmp_path: Path) -> None:
    """Labels are the answers of the merge at scale 1.3: nothing else answers all of them."""
    from merging.searches.evaluator import DataObjective, Request
    from merging.searches.examples import read_tasks
    from merging.searches.settings import SearchSettings

    settings = SearchSettings()
    words = [{**each, "label": "low"} for each in (*labels.world.train, *labels.world.test)]
    inputs = MergeInputs(models=tuple(map(str, labels.full)), options={"base": str(labels.base)})
    tasks = read_tasks([words], [], str(labels.base), settings)
    evaluator = DataObjective(inputs=inputs, tasks=tasks, metric="loss", settings=settings, device="cpu").load()
    planted = MergeCandidate("planted", "task_arithmetic", {"scale": 1.3}, (0, 1, 2))
    evaluator(Request(planted, "valid", ((0, 1),)))
    with torch.no_grad():
        logits = torch.cat([evaluator.models[0].answers([item]).logits for item in evaluator.valid[0]])
    order = {each.text: row for each, row in zip(tasks[0].valid, logits.argmax(1).tolist(), strict=True)}
    data = [{**each, "label": order[each["text"]]} for each in words]
    assert len({each["label"] for each in data}) == 2
    candidates = ["task_arithmetic:scale=0..3"]
    made = labels.arguments(tmp_path / "out", data=data[:48], test=data[48:], candidates=candidates, budget=40)
    found = merging.search(**made)
    (scale,) = (link.scale for link in found.recipe.method.links())  # type: ignore[attr-defined]
    assert abs(scale - 1.3) < 0.4
    assert found.report.rows[0].score > 0.9


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_language_model_is_searched_by_perplexity(kind: str, texts: Any, tmp_path: Path) -> None:
    made = texts.arguments(tmp_path / "out", models=getattr(texts, kind), metric="perplexity", budget=14)
    found = merging.search(**made)
    assert found.report.metric == "perplexity"
    assert (tmp_path / "out" / ("adapter_config.json" if kind == "adapters" else "config.json")).is_file()
    rows = {row.title: row.score for row in found.report.rows}
    assert rows["the winner"] >= max(rows["plain average"], rows["base"]) - 0.05


@pytest.mark.exhaustive
def test_several_tasks_count_equally(labels: Any, tmp_path: Path) -> None:
    low = [each for each in labels.world.train if each["label"] == "low"]
    made = labels.arguments(tmp_path / "out", data=[labels.world.train, low], test=[labels.world.test, low], budget=14)
    found = merging.search(**made)
    winner = found.report.rows[0]
    assert winner.score == pytest.approx(sum(float(each) for each in winner.tasks) / 200, abs=1e-3)


@pytest.mark.exhaustive
def test_unlabelled_texts_are_searched_by_entropy(labels: Any, tmp_path: Path) -> None:
    data = [{"text": each["text"]} for each in labels.world.train]
    found = merging.search(**labels.arguments(tmp_path / "out", data=data, test=None, metric="entropy", budget=14))
    assert found.report.metric == "entropy"
    assert "nothing is concluded" in found.report.verdict


@pytest.mark.exhaustive
def test_a_recipe_with_ranges_is_searched(labels: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(
        f"models: [{labels.full[0]}, {labels.full[1]}]\nbase: {labels.base}\nmethod: ties\n"
        'parameters: {density: "?", scale: 0.5..1.5, vote: plain|weighted}\n'
    )
    made = labels.arguments(tmp_path / "out", models=[tmp_path / "recipe.yml"], budget=12)
    del made["base"]
    found = merging.search(**made)
    tried = [row.name for row in found.report.trials if row.name.startswith("ties")]
    assert len(tried) > 2
    assert all("density=" in name and "vote=" in name for name in tried)


@pytest.mark.exhaustive
def test_groups_are_points_along_the_depth(labels: Any, tmp_path: Path) -> None:
    made = labels.arguments(tmp_path / "out", candidates=["task_arithmetic:scale=0..2"], groups=2, budget=12)
    found = merging.search(**made)
    tried = [row.name for row in found.report.trials if "(scale=" in row.name]
    assert tried
    assert all(":" in name for name in tried)


# --- coefficients by gradient -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("strategy", ["gradient", "adamerging"])
def test_coefficients_by_gradient_lower_what_they_are_tuned_on(
    strategy: str, kind: str, labels: Any, tmp_path: Path
) -> None:
    metric = "loss" if strategy == "gradient" else "entropy"
    made = labels.arguments(tmp_path / "out", models=getattr(labels, kind), candidates=[], budget=8, metric=metric)
    found = merging.search(**{**made, "strategy": strategy, "steps": 30, "rate": 0.05})
    scores = {row.name.partition(",")[0]: row.score for row in found.report.trials}
    assert scores[strategy] > scores["task arithmetic at 0.3"]  # where it began
    if found.winner.startswith(strategy):
        weights = merging.load_recipe(tmp_path / "out" / "recipe.yml").to_dict()["parameters"]["weights"]
        assert {"bert.encoder.layer.0.*", "bert.encoder.layer.1.*"} <= weights.keys()
        assert all(len(each) == 3 for each in weights.values())


@pytest.mark.exhaustive
def test_adamerging_is_the_gradient_of_an_independent_program(labels: Any, tmp_path: Path) -> None:
    """One step from 0.3, by a plain sum of weights and torch's own functional call."""
    from safetensors.torch import load_file
    from torch.func import functional_call

    from merging.recycling.seeds import batch
    from merging.searches.evaluator import DataObjective
    from merging.searches.examples import read_tasks
    from merging.searches.gradient import tune_by_gradient
    from merging.searches.settings import SearchSettings

    settings = SearchSettings(strategy="adamerging", steps=1, rate=0.1, metric="entropy")
    inputs = MergeInputs(models=tuple(map(str, labels.full)), options={"base": str(labels.base)})
    tasks = read_tasks([labels.world.train], [], str(labels.base), settings)
    objective = DataObjective(inputs=inputs, tasks=tasks, metric="entropy", settings=settings, device="cpu")
    evaluator = objective.load()
    tuned = tune_by_gradient(evaluator, settings).parameters["weights"]
    base = load_file(labels.base / "model.safetensors")
    changes = [{n: v - base[n] for n, v in load_file(each / "model.safetensors").items()} for each in labels.full]
    names = [name for name in base if base[name].is_floating_point()]
    groups = {name: next((k for k in tuned if name.startswith(k[:-1]) and k != "*"), "*") for name in names}
    weights = {group: torch.full((3,), 0.3, requires_grad=True) for group in tuned}
    merged = {n: base[n] + sum(weights[groups[n]][m] * changes[m][n] for m in range(3)) for n in names}
    model, items = evaluator.models[0], evaluator.valid[0]
    chosen = [items[place] for place in batch(0, 16, len(items), 0)]
    given = model._pad([item.tokens for item in chosen])
    logits = functional_call(model.network, merged, kwargs=given).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    entropy.backward()
    for group, values in tuned.items():
        # a first step of Adam is the learning rate against the sign of the gradient
        gradient = weights[group].grad
        assert gradient is not None
        expected = 0.3 - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=2e-4)


# --- merges in memory are the written ones ----------------------------------------------------------------------------

ROWS = [row for row in TABLE if row.least <= 2 and row.most != 1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", ROWS, ids=[f"{place}-{row}" for place, row in enumerate(ROWS)])
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_every_method_in_memory_is_the_written_merge(row: Row, kind: str, texts: Any, tmp_path: Path) -> None:
    _check_in_memory(texts, kind, row.chain, row.parameters, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("chain", ["ties", "lines+slerp", "decouple+tsv"])
def test_a_merge_in_memory_is_the_written_one(chain: str, kind: str, texts: Any, tmp_path: Path) -> None:
    _check_in_memory(texts, kind, chain, {}, tmp_path)


def _check_in_memory(texts: Any, kind: str, chain: str, parameters: dict[str, Any], folder: Path) -> None:
    models = [str(each) for each in getattr(texts, kind)[:2]]
    merger = MemoryMerger(MergeInputs(models=tuple(models), options={"base": str(texts.base)}), torch.device("cpu"))
    for scale in (None, 0.6):
        stated = parameters if scale is None else {**parameters, "scale": scale}
        try:
            merging.chain(chain, stated).check(2)
        except OptionError:
            continue
        written = folder / f"out-{scale}"
        merging.merge(models, method=chain, base=texts.base, output=written, **stated)
        candidate = MergeCandidate("it", chain, stated, (0, 1))
        merged, read = dict(merger.merge(candidate)), dict(merger.merged_file(str(written)))
        assert merged.keys() == read.keys() if scale is None else merged.keys() <= read.keys()
        for name, value in merged.items():
            torch.testing.assert_close(value, read[name], rtol=1e-4, atol=1e-5)


# --- killed, and gone on with -----------------------------------------------------------------------------------------


class _Killed(Exception):
    """Stands for a kill: nothing of the search catches it."""


@pytest.mark.exhaustive
def test_a_killed_search_goes_on_to_the_same_result(
    labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = labels.arguments(tmp_path / "whole", budget=22)
    whole = merging.search(**made)
    asked: list[str] = []

    def stop(line: str) -> None:
        asked.append(line)
        if len(asked) == 15:
            raise _Killed

    killed = {**made, "output": tmp_path / "out"}
    with pytest.raises(_Killed):
        merging.search(**killed, on_event=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="holds an unfinished run"):
        merging.search(**killed)
    with pytest.raises(OptionError, match="had another metric"):
        merging.search(**{**killed, "metric": "loss"}, resume=True)
    measured: list[str] = []
    call = Evaluator.__call__
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, request: (measured.append(request.part), call(self, request))[1]
    )
    again = merging.search(**killed, resume=True)
    assert measured.count("valid") == 22 - 15
    assert again.report.rows == whole.report.rows
    assert _contents(tmp_path / "out")["report"] == _contents(tmp_path / "whole")["report"]


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to search by": ({"data": None, "test": None}, "give either examples"),
    "two objectives": ({"score": "true"}, "give either examples"),
    "no such chain": ({"candidates": ["tiess:scale=0..1"]}, "tiess"),
    "no such parameter": ({"candidates": ["ties:scales=0..1"]}, "scales"),
    "a range the wrong way": ({"candidates": ["ties:scale=1..0"]}, "a range is LOW..HIGH"),
    "a range out of bounds": ({"candidates": ["ties:density=0.1..7"]}, "density"),
    "no value": ({"candidates": ["ties:scale"]}, "should be NAME=VALUE"),
    "no YAML": ({"candidates": ["ties:scale=[1"]}, "[1 is no value of a parameter"),
    "no usual range": ({"candidates": ["ties:vote=?"]}, "vote has no usual range"),
    "too small a budget": ({"budget": 3}, "need at least"),
    "an unknown option": ({"bugdet": 3}, "did you mean 'budget'"),
    "tests of other tasks": ({"test": [[{"text": "a", "label": "low"}], [{"text": "b", "label": "low"}]]}, "1 files"),
    "a label of no head": ({"data": [{"text": "w1", "label": "left"}], "test": None}, "no label 'left'"),
    "a test label without an example": ({"test": [{"text": "w1", "label": "left"}]}, "has the label 'left'"),
    "perplexity of labels": ({"metric": "perplexity"}, "is for prompts and completions"),
    "a gradient without a base": ({"base": None, "strategy": "gradient"}, "weighs changes from a base"),
    "a file": ({"output": Path("out.safetensors")}, "name a folder"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", WRONG)
def test_a_refused_search_leaves_nothing_behind(
    case: str, labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MergingError, match=None) as refused:
        merging.search(**{**labels.arguments(tmp_path / "out"), **changed})
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_adapters_without_a_base_are_refused(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="adapters are measured on their base"):
        merging.search(labels.adapters, data=labels.world.train, output=tmp_path / "out")


@pytest.mark.exhaustive
def test_a_merge_that_fails_is_a_record_and_the_search_goes_on(labels: Any, tmp_path: Path) -> None:
    candidates = ["task_arithmetic:scale=1e6..1e7", "ties:scale=0.5..1"]
    found = merging.search(**labels.arguments(tmp_path / "out", candidates=candidates, budget=14, dtype="float16"))
    failed = [row for row in found.report.trials if row.error]
    assert failed
    assert "beyond the range" in failed[0].error
    assert any("failed" in notice for notice in found.report.notices)


@pytest.mark.exhaustive
def test_all_candidates_failing_is_an_error(labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MemoryMerger, candidate: MergeCandidate) -> Any:
        raise InputError("the disk is gone")

    prepared = Evaluator.__init__

    def broken(self: Evaluator, objective: Any) -> None:
        prepared(self, objective)
        monkeypatch.setattr(MemoryMerger, "merge", fail)

    monkeypatch.setattr(Evaluator, "__init__", broken)
    with pytest.raises(InputError, match="all 7 candidates failed, the last one: the disk is gone"):
        merging.search(**labels.arguments(tmp_path / "out", budget=14))
    assert not (tmp_path / "out").exists()
