"""Recycling from a pool and examples to an adapter and its report: what comes out, what is refused, what survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import merging
from merging.cli.main import cli
from merging.errors import InputError, MergingError, OptionError
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from merging.recycling.mixing import TUNED, fit
from merging.recycling.pool_adapters import find_usable, list_adapters, open_expert
from merging.recycling.problem import single_adapter
from merging.recycling.report import MERGE, SINGLE
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.selection import choose, score_candidates
from merging.recycling.settings import Settings
from merging.recycling.training import TrainingPlan
from merging.recycling.training import train as tune
from support.adapters import QUIRKS, edit_config, edit_tensors, peft, reload, train
from support.recycling_tasks import FAST, ROWS, World, causal, classifier, contents, encoder, seq2seq
from support.systems import POSIX

pytestmark = [*QUIRKS, pytest.mark.exhaustive]


# --- every kind of model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [classifier, encoder, causal, seq2seq])
def test_a_run_of_every_kind_of_model(make: Callable[[Path], World], tmp_path: Path) -> None:
    world = make(tmp_path)
    done = merging.recycle(**world.arguments(output=tmp_path / "out", rank=None))
    report = json.loads((tmp_path / "out" / "recycling.json").read_text())
    assert done.report.verdict.sentence == report["verdict"]
    assert {row["title"] for row in report["rows"]} >= ROWS
    assert report["measured_on"] == "test"
    assert all(row["ahead"] is None for row in report["rows"] if row["title"] == MERGE)
    valid = report["validation_loss"]
    trivial = [valid[name] for name in ("base", "few-shot LoRA", "best single adapter")]
    assert valid["returned"] <= min(*trivial, valid["tuned"]) + 1e-9
    assert report["verdict"] in (tmp_path / "out" / "recycling.html").read_text()
    assert not (tmp_path / ".out.recycling").exists()
    # what was measured is what PEFT makes of what was written
    if make is not encoder:  # its head is ours
        model = peft.PeftModel.from_pretrained(reload(world.base), tmp_path / "out")
        problem = world.problem()
        problem.model.network = model.eval()
        assert problem.model.scores(problem.valid).loss == pytest.approx(valid["returned"], rel=1e-4)


def test_the_written_adapter_merges_and_is_cut_to_a_rank(planted: World, tmp_path: Path) -> None:
    world = planted
    done = merging.recycle(**world.arguments(output=tmp_path / "out", rank=1, method="linear", target_lora="none"))
    assert done.rank == 1
    assert done.kept < 1
    assert "the merge, folded" in {row.title for row in done.report.rows}
    folded = json.loads((tmp_path / "out" / "recycling.json").read_text())
    assert folded["fold"]["energy_kept"] == done.kept
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {1}
    # what is written is no worse on validation than the base, best single and what they are when cut
    expert = open_expert(list_adapters(tmp_path / "out", str(world.base))[0], world.problem().model.hook_points)
    problem = world.problem()
    assert single_adapter(expert).validate(problem).loss <= folded["validation_loss"]["base"] + 1e-6
    merged = merging.merge(
        [tmp_path / "out"], method="linear", base=world.base, kind="model", output=tmp_path / "model"
    )
    assert merged.kind == "model"


def test_transfer_is_found_where_it_is(planted: World, tmp_path: Path) -> None:
    told: list[str] = []
    done = merging.recycle(**planted.arguments(output=tmp_path / "out", steps=20, on_event=told.append, resamples=1000))
    rows = {row.title: row for row in done.report.rows}
    assert rows[SINGLE].note == "a3"
    assert rows[SINGLE].accuracy == 1
    assert done.report.verdict.transfer
    assert done.report.verdict.sentence.startswith("Transfer: ")
    assert told[0].startswith("loading")


def test_transfer_is_not_found_where_the_pool_knows_nothing(planted: World, tmp_path: Path) -> None:
    pool = [path for path in planted.pool.iterdir() if path.name != "a3"]
    arguments = planted.arguments(pool=pool, output=tmp_path / "out", lora_steps=40, steps=20, resamples=1000)
    verdict = merging.recycle(**arguments).report.verdict
    assert not verdict.transfer
    assert "Transfer" not in verdict.sentence


def test_nothing_is_concluded_without_test_examples(world: World, tmp_path: Path) -> None:
    leaking = [*world.valid, world.train[0]]
    report = merging.recycle(**world.arguments(output=tmp_path / "out", test=None, valid=leaking)).report
    assert not report.tested
    assert "without test examples" in report.verdict.sentence
    assert "1 training examples are also validated on" in report.notices


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*TUNED, "lorahub", "linear", "ties", "knots+ties"])
def test_methods(method: str, world: World, tmp_path: Path) -> None:
    """Each comes with a loss that is what its coefficients give, and what is tuned is no worse than its start."""
    problem = world.problem(method=method)
    experts = world.experts(problem)[:3]
    checkpoint = RunCheckpoint(tmp_path / "checkpoint", {})
    found = fit(problem, experts, checkpoint, "fit", 1)
    assert found.loss == pytest.approx(found.scores(problem, problem.valid).loss, rel=1e-6)
    if method in TUNED:
        assert found.loss <= found.curve[0][2] + 1e-12
        assert found.curve[-1][0] == 10
        assert found.granularity == TUNED[method].granularity
    if method == "adamerging":
        assert 0 <= float(found.coefficients.min()) <= float(found.coefficients.max()) <= 1
    if method == "lorahub":
        values = [value for _, value, _ in found.curve]
        start = single_adapter(experts[1]).scores(problem, problem.learn).loss + 0.05 / 3
        assert values[0] == pytest.approx(start, rel=1e-5)  # the target alone
        assert float(found.coefficients.abs().max()) <= 1.5
        loss = found.scores(problem, problem.learn).loss + 0.05 * float(found.coefficients.abs().mean())
        assert loss == pytest.approx(min(values), rel=1e-5)


def test_entropy_makes_answers_sure_without_labels(world: World, tmp_path: Path) -> None:
    def entropy(wrong: bool) -> tuple[float, float, torch.Tensor]:
        flipped = {"low": "high", "high": "low"} if wrong else {"low": "low", "high": "high"}
        examples = [{**each, "label": flipped[each["label"]]} for each in world.train]
        problem = World(world.base, world.pool, examples, world.valid, world.test).problem(
            method="adamerging", rate=0.1, steps=20, every=20, granularity="expert"
        )
        mixture = problem.mixture(world.experts(problem), "expert", "linear")
        coefficients = mixture.full(0.3).requires_grad_(True)

        def mean_entropy() -> float:
            with torch.no_grad(), mixture.at(coefficients):
                return float(problem.model.answers(problem.learn).entropies(len(problem.learn)).mean())

        before = mean_entropy()
        plan = TrainingPlan(rate=0.1, steps=20, every=20, entropy=True, bounds=(0.0, 1.0))
        checkpoint = RunCheckpoint(tmp_path / f"checkpoint {wrong}", {})
        tune([coefficients], lambda: mixture.at(coefficients), problem=problem, plan=plan, checkpoint=checkpoint,
             stage="fit")  # fmt: skip
        return before, mean_entropy(), coefficients.detach()

    right, wrong = entropy(False), entropy(True)
    assert right[1] < right[0]
    assert torch.equal(right[2], wrong[2])


@pytest.mark.parametrize("granularity", ["expert", "layer", "sublayer", "module", "rank"])
def test_granularities_are_tuned(granularity: Any, world: World, tmp_path: Path) -> None:
    problem = world.problem(granularity=granularity)
    found = fit(problem, world.experts(problem)[:2], RunCheckpoint(tmp_path / "checkpoint", {}), "fit")
    groups = {"expert": 1, "layer": 2, "sublayer": 4, "module": 6}  # three modules in each of two layers
    wanted = 6 * (2 + 3) if granularity == "rank" else 2 * groups[granularity]
    assert len(found.coefficients) == wanted


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", Settings.model_fields["select"].annotation.__args__)
def test_selection(select: str, world: World, tmp_path: Path) -> None:
    problem = world.problem(select=select, k=2)
    found = list_adapters(world.pool, str(world.base))
    experts = {each.name: each for each in world.experts(problem)}
    target = experts["a1"]
    scores = score_candidates(found, problem, target, RunCheckpoint(tmp_path / "checkpoint", {}))
    assert scores.keys() == experts.keys()
    best = sorted(scores, key=lambda name: (-scores[name], name))
    chosen = choose(found, scores, problem)
    assert [each.name for each in chosen.experts] == best[:2]
    again = score_candidates(tuple(reversed(found)) if select != "random" else found, problem, target,
                   RunCheckpoint(tmp_path / "other", {}))  # fmt: skip
    assert again == pytest.approx(scores)
    if select == "evaluation":
        losses = {name: single_adapter(each).scores(problem, problem.shots).loss for name, each in experts.items()}
        assert scores == pytest.approx({name: -loss for name, loss in losses.items()})
    elif select == "rank":
        assert scores == {f"a{i}": float(2 + i % 3) for i in range(5)}
    elif select == "screen":
        # a small step along an adapter changes the loss as the score says
        step = 1e-3
        base = single_adapter(None).scores(problem, problem.learn).loss
        for name, expert in experts.items():
            small = single_adapter(expert).mixture(problem)
            with small.at(torch.full((1,), step)):
                loss = problem.model.scores(problem.learn).loss
            assert (base - loss) / step / expert.norm == pytest.approx(scores[name], rel=0.1, abs=1e-3)
    elif select != "random":
        assert best[0] == "a1"  # nothing is closer to the target than itself


def test_random_selection_follows_the_seed(world: World, tmp_path: Path) -> None:
    found = list_adapters(world.pool, str(world.base))

    def drawn(seed: int) -> dict[str, float]:
        with closing(RunCheckpoint(tmp_path / f"{seed}", {}, True)) as checkpoint:
            return score_candidates(found, world.problem(select="random", seed=seed), None, checkpoint)

    assert drawn(1) == drawn(1)
    assert any(drawn(1) != drawn(seed) for seed in (2, 3))


def test_owners_and_repeats_are_passed_over(world: World, tmp_path: Path) -> None:
    for name, owner in (("a0", "me"), ("a1", "me"), ("a2", "you")):
        shutil.copytree(world.pool / name, tmp_path / "pool" / owner / name)
    gauge = tmp_path / "pool" / "you" / "again"
    shutil.copytree(world.pool / "a1", gauge)
    edit_tensors(gauge, lambda t: {n: v * 4 if "lora_A" in n else v / 4 for n, v in t.items()})
    problem = world.problem(select="rank", owner_cap=1, k=4)
    found = list_adapters(tmp_path / "pool", str(world.base))
    assert [each.name for each in found] == ["me/a0", "me/a1", "you/a2", "you/again"]
    chosen = choose(found, {"me/a0": 1.0, "me/a1": 4.0, "you/again": 3.0, "you/a2": 2.0}, problem)
    assert [each.name for each in chosen.experts] == ["me/a1", "you/a2"]
    assert chosen.passed_over == {
        "me/a0": "me has 1 among the chosen",
        "you/again": "changes the same as me/a1",
    }


# --- pools ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_mixed_is_left_out_and_said(world: World, tmp_path: Path) -> None:
    pool = shutil.copytree(world.pool, tmp_path / "pool")
    edit_tensors(pool / "a0", lambda t: {n: v * float("nan") for n, v in t.items()})
    edit_tensors(pool / "a1", lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()})
    edit_tensors(pool / "a2", lambda t: {n: v[:, :-1] if "lora_A" in n else v for n, v in t.items()})
    edit_config(pool / "a3", base_model_name_or_path="someone/else")
    found = find_usable(list_adapters(pool, str(world.base)), world.problem().model.hook_points)
    assert [each.name for each in found.usable] == ["a3", "a4"]
    assert "NaN" in found.left_out["a0"]
    assert "changes nothing" in found.left_out["a1"]
    assert "adapter of this base" in found.left_out["a2"]
    assert any("someone/else" in notice for notice in found.notices)
    for name in ("a3", "a4"):
        shutil.rmtree(pool / name)
    with pytest.raises(InputError, match=r"none of the 3 adapters can be used: .*NaN"):
        find_usable(list_adapters(pool, str(world.base)), world.problem().model.hook_points)


def test_an_audited_pool(world: World, tmp_path: Path) -> None:
    incoming = shutil.copytree(world.pool, tmp_path / "incoming")
    edit_tensors(incoming / "a0", lambda t: {n: v * float("nan") for n, v in t.items()})
    pool = Pool.create(tmp_path / "pool", world.base)
    pool.build(candidates_in(incoming))
    names = [each.name for each in list_adapters(pool.path, str(world.base))]
    assert names == [Path(entry.name).name for entry, _ in pool.usable()]
    assert "a0" not in names and names
    other = shutil.copytree(world.base, tmp_path / "other")
    with pytest.raises(InputError, match=r"is a pool of adapters of .*base, and the base is .*other"):
        list_adapters(pool.path, str(other))


def test_two_of_one_name_are_told_apart(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.pool / "a1", tmp_path / "a0")
    shutil.copytree(world.pool / "a3", tmp_path / "base")
    found = list_adapters([world.pool / "a0", tmp_path / "a0", world.pool / "a2", tmp_path / "base"], str(world.base))
    told_apart = ["a2", str(world.pool / "a0"), str(tmp_path / "a0"), str(tmp_path / "base")]
    assert [each.name for each in found] == sorted(told_apart)


# --- the same again ---------------------------------------------------------------------------------------------------


def test_the_order_of_the_pool_changes_no_byte(world: World, tmp_path: Path) -> None:
    folders = sorted(world.pool.iterdir())
    for name, pool in (("one", folders), ("other", folders[::-1])):
        merging.recycle(**world.arguments(pool=pool, output=tmp_path / name, target_lora="none"))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("method", ["ours", "lorahub"])
def test_a_run_that_died_after_any_stage_comes_to_the_same(
    method: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = world.arguments(k=2, method=method, steps=8, every=4, lora_steps=4, target_lora="none")
    merging.recycle(**arguments, output=tmp_path / "whole")
    keep = RunCheckpoint.keep

    class Died(Exception):
        pass

    def dying(self: RunCheckpoint, stage: str, values: Any) -> None:
        keep(self, stage, values)
        raise Died

    stages = []
    for _ in range(100):
        monkeypatch.setattr(RunCheckpoint, "keep", dying)
        try:
            merging.recycle(**arguments, output=tmp_path / "out", resume=True)
        except Died:
            stages.append(len(list((tmp_path / ".out.recycling").iterdir())))
        else:
            break
    assert len(stages) > 20  # the run died at least so often, and went on each time
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@POSIX
def test_a_killed_run_goes_on(world: World, tmp_path: Path) -> None:
    """SIGKILL while coefficients are tuned; the next run goes on, and comes to the same bytes."""
    for part in ("train", "valid", "test"):
        lines = [json.dumps(each) for each in getattr(world, part)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    words = [sys.executable, "-m", "merging", "recycle", str(world.pool), "--base", str(world.base)]
    for part in ("train", "valid", "test"):
        words += [f"--{part}", f"{part}.jsonl"]
    words += ["--k", "3", "--steps", "16", "--every", "1", "--lora-steps", "5", "--lora-rate", "0.01", "-o", "out"]
    checkpoint = tmp_path / ".out.recycling"
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not (checkpoint / "fit.pt").is_file():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    step = torch.load(checkpoint / "fit.pt", weights_only=True)["step"]
    assert 0 < step < 16
    os.chdir(tmp_path)
    settings = {"k": 3, "steps": 16, "every": 1, "lora_steps": 5, "lora_rates": (0.01,)}
    parts = {part: f"{part}.jsonl" for part in ("train", "valid", "test")}
    with pytest.raises(OptionError, match="holds an unfinished run: resume=True continues"):
        merging.recycle(str(world.pool), base=world.base, output="out", **parts, **settings)
    with pytest.raises(OptionError, match="had another steps"):
        merging.recycle(
            str(world.pool), base=world.base, output="out", resume=True, **parts, **{**settings, "steps": 9}
        )
    merging.recycle(str(world.pool), base=world.base, output="out", resume=True, **parts, **settings)
    merging.recycle(str(world.pool), base=world.base, output="whole", **parts, **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not checkpoint.exists()


def test_a_full_model_is_no_adapter(world: World, tmp_path: Path) -> None:
    hook_points = world.problem().model.hook_points
    full = world.base / "model.safetensors"
    with pytest.raises(MergingError, match="is a full checkpoint"):
        open_expert(list_adapters(full, str(world.base))[0], hook_points)


def test_heads_of_other_tasks_stay_behind(world: World, tmp_path: Path) -> None:
    train(tmp_path / "headed", world.base, 3, ["query"], modules_to_save=["classifier"])
    expert = open_expert(list_adapters(tmp_path / "headed", str(world.base))[0], world.problem().model.hook_points)
    assert all(".query." in name for name in expert.deltas)
    assert "its own head" in expert.notices[0]


def test_settings_have_one_home() -> None:
    """Every setting is an option of the command."""
    done = CliRunner().invoke(cli, ["recycle", "--help"])
    for name in set(Settings.model_fields) - {"lora_rates"}:
        assert f"--{name.replace('_', '-')}" in done.output
    assert FAST.keys() <= Settings.model_fields.keys()
