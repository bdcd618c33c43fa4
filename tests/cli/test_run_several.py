"""Several recipes in one process: ``merge run one.yml two.yml``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.commands import merge, ok, refused
from support.tiny import checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two models, and recipes; the working folder."""
    checkpoint(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    recipe("one", "[tuned0, tuned1]", "linear")
    recipe("two", "[tuned0, tuned1]", "ties, base: base")
    recipe("three", "[merged/one, tuned1]", "linear")
    return tmp_path


def recipe(name: str, models: str, method: str) -> Path:
    path = Path(f"{name}.yml")
    path.write_text(f"{{models: {models}, method: {method}}}")
    return path


def test_each_recipe_has_the_output_of_a_run_alone() -> None:
    """Also the third, which reads the output of the first."""
    ok("run", "one.yml", "two.yml", "three.yml")
    for name in ("one", "two", "three"):
        ok("run", f"{name}.yml", "-o", f"alone/{name}")
        assert (
            Path(f"alone/{name}/model.safetensors").read_bytes()
            == Path(f"merged/{name}/model.safetensors").read_bytes()
        )


def test_settings_change_all_and_each_prints_its_object() -> None:
    printed = ok("run", "one.yml", "two.yml", "-o", "out", "--set", "models.1=tuned0", "--json").stdout
    first, second = json.loads(f"[{printed.replace(chr(10) + '}' + chr(10) + '{', '},{')}]")
    assert [first["path"], second["path"]] == ["out/one", "out/two"]
    same = load_file("tuned0/model.safetensors")
    assert all(torch.equal(value, same[name]) for name, value in load_file("out/one/model.safetensors").items())


def test_dry_runs_and_plans() -> None:
    for words in (["run", "one.yml", "two.yml", "--dry-run"], ["plan", "one.yml", "two.yml"]):
        shown = ok(*words).stdout
        assert "into the model merged/one" in shown
        assert "into the model merged/two" in shown
        said = refused(*words, "three.yml")
        assert "three.yml: reads the output of one.yml: plan it when that is written" in said
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("one.yml nested/one.yml", "nested/one.yml: its output merged/one is the output of one.yml too"),
        ("one.yml lost.yml", "lost.yml, line 1: nowhere: there is no such file or folder"),
        ("one.yml half.yml", "half.yml, line 1: nowhere: there is no such file or folder"),
        ("one.yml wrong.yml", "weights has 3 values for 2 models"),
        ("three.yml one.yml", "three.yml: reads merged/one, which one.yml makes: name one.yml before three.yml"),
        ("one.yml two.yml -o all.safetensors", "all.safetensors: is one file, and each of 2 recipes has an output"),
        ("one.yml -", "-: has no name that its output could have"),
        ("one.yml two.yml --report page.html", "--report is for one output: run each recipe alone"),
        ("one.yml two.yml --push me/it", "--push is for one output: run each recipe alone"),
        ("one.yml two.yml --keep-stages kept", "--keep-stages is for one output: run each recipe alone"),
        ("one.yml two.yml --recipe-only", "--recipe-only prints one recipe: name one"),
    ],
)
def test_all_are_checked_before_the_first_is_run(words: str, said: str) -> None:
    recipe("lost", "[tuned0, nowhere]", "linear")
    recipe("half", "[merged/one, nowhere]", "linear")
    recipe("wrong", "[tuned0, tuned1]", "linear, parameters: {weights: [1, 2, 3]}")
    Path("nested").mkdir()
    shutil.copy("one.yml", "nested")
    assert said in refused("run", *words.split())
    assert not Path("merged").exists()


def test_an_output_that_exists_is_found_before_the_first_is_run() -> None:
    ok("run", "two.yml", "-o", "merged/two")
    assert "two.yml: merged/two exists already" in refused("run", "one.yml", "two.yml")
    assert not Path("merged/one").exists()
    ok("run", "one.yml", "two.yml", "--overwrite")


def test_an_output_that_exists_is_found_though_its_recipe_waits_for_another() -> None:
    recipe("later", "[merged/one, tuned1]", "linear")
    ok("run", "two.yml", "-o", "merged/later")
    assert "later.yml: merged/later exists already" in refused("run", "one.yml", "later.yml")
    assert not Path("merged/one").exists()


def test_a_failure_says_which_are_done() -> None:
    bad = {name: torch.full_like(value, torch.nan) for name, value in load_file("tuned1/model.safetensors").items()}
    shutil.copytree("tuned1", "bad")
    save_file(bad, "bad/model.safetensors")
    recipe("broken", "[tuned0, bad]", "linear")
    failed = merge("run", "one.yml", "broken.yml", "two.yml")
    assert failed.exit_code == 1
    said = failed.stderr
    assert "NaN or infinite values" in said
    assert said.endswith("  done: one.yml is in merged/one\n  not done: broken.yml two.yml\n")
    assert sorted(path.name for path in Path("merged").iterdir()) == ["one"]
    ok("run", "two.yml", "one.yml", "--resume", "--overwrite")


def test_a_model_that_changes_between_merges_is_read_again() -> None:
    """Headers are shared among the merges of a process, as long as their files stay as they are."""
    recipe("again", "[merged/one, tuned1]", "linear")
    ok("run", "one.yml", "again.yml")
    first = Path("merged/again/model.safetensors").read_bytes()
    for name, value in (values := load_file("tuned0/model.safetensors")).items():
        values[name] = value + 1
    save_file(values, "tuned0/model.safetensors")
    ok("run", "one.yml", "again.yml", "--overwrite")
    assert Path("merged/again/model.safetensors").read_bytes() != first
