"""``merge plan``: a merge, typed or in a recipe, is predicted from headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merging.api import calibrate
from support.commands import ok, refused
from support.tiny import fine_tune, model, save


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = model(0)
    save(tmp_path / "base", base)
    for number, name in enumerate(("one", "two")):
        save(tmp_path / name, fine_tune(base, number))
    (tmp_path / "recipe.yml").write_text("models: [one, two]\nmethod: ties\nbase: base\nparameters: {density: 0.3}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_the_dry_run_and_a_prediction(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    words = ("--method", "ties", "--density", "0.3", "one", "two", "--base", "base", "--json")
    planned = json.loads(ok("plan", *words, "--cluster", "nodes=8,disk=2GB/s,price=2.5").stdout)
    prediction = planned.pop("prediction")
    assert planned == json.loads(ok(*words, "--dry-run").stdout)
    assert prediction["nodes"] == 8
    assert prediction["sweeps"] == 4
    assert prediction["cost"] > 0
    recipe = json.loads(ok("plan", "recipe.yml", "--json", "--set", "density=0.5").stdout)
    assert recipe["prediction"]["read_bytes"] == prediction["read_bytes"]
    assert recipe["set"] == ["density=0.5"]
    assert sorted(folder.rglob("*")) == before


def test_a_plan_is_printed() -> None:
    said = ok("plan", "recipe.yml", "--cluster", "nodes=8,gpus=1,price=2.5")
    names = [line.split()[0] for line in said.stdout.splitlines()]
    assert names[:10] == ["ties:", "reads", "writes", "memory", "sweeps", "worker", "flops", "work", "time", "cost"]
    assert "merge plan --calibrate" in said.stderr
    assert "no GPU was measured" in said.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is nothing to plan: name a recipe (merge plan recipe.yml)"),
        (("none.yml",), "none.yml: cannot be read"),
        (("one", "two"), "which method?"),
        (("recipe.yml", "--cluster", "node=8"), "there is no key 'node' (did you mean 'nodes'?)"),
        (("recipe.yml", "--cluster", "disk=8"), "write bytes a second, as disk=2GB/s"),
        (("recipe.yml", "--base", "base"), "--base is in the recipe: change it there, or by --set"),
        (("-m", "linear", "one", "two", "--set", "x=1"), "--set is for recipes in a file: leave it out"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str) -> None:
    assert message in refused("plan", *words)


def test_a_machine_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUDGET", 0.0)  # two methods, and the others by default rates
    before = sorted(folder.iterdir())
    found = json.loads(ok("plan", "--calibrate", "--json").stdout)
    assert set(found["methods"]) == {"linear", "task_arithmetic"}
    assert found["read"] > 0
    assert found["write"] > 0
    assert Path(found["path"]).is_file()
    assert sorted(path for path in folder.iterdir() if path.name != "cache") == before
    planned = ok("plan", "recipe.yml")
    assert "--calibrate" not in planned.stderr


@pytest.mark.exhaustive
def test_all_methods_are_measured() -> None:
    found = json.loads(ok("plan", "--calibrate", "--json").stdout)["methods"]
    assert all(rate >= 0 for rates in found.values() for rate in rates.values())
    assert all(found[name]["flop"] > 0 for name in ("tsv", "svd") if name in found)
