"""Recipes in files: their paths, lines in errors, and values changed from the command line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch import equal

from merging.cli.run import FULL_RECIPE, SMALL_RECIPE
from merging.errors import OptionError
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import parse_recipe, read_recipe
from merging.plan.recipe_settings import parse_setting
from support.commands import ok, refused
from support.tiny import checkpoint, load, model, save

TIES = """\
models:
- tuned0
- tuned1
base: base
method: ties
parameters:
  weights: [1, 2]
  ties.density: {mlp: 0.3, "*": 0.2}
  scope: tensor
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, tuned0 and tuned1."""
    checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- paths


def test_paths_are_relative_to_the_recipes_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipe.yml").write_text(TIES)
    ok("run", "recipe.yml", "-o", "here")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert "folder" not in ok("run", "../recipe.yml").stderr
    got, want = load(folder / "elsewhere" / "merged"), load(folder / "here")
    assert all(equal(got[name], want[name]) for name in want)
    assert list(read_recipe(Path("../recipe.yml")).recipe.models) == ["../tuned0", "../tuned1"]


def test_errors_of_paths_say_where_they_were_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipe.yml").write_text("models: [tuned0, tuned]\nmethod: linear\n")
    (folder / "elsewhere").mkdir()
    said = refused("run", "recipe.yml")
    assert said.startswith("Error: recipe.yml, line 1: tuned: there is no such file or folder (did you mean 'tuned")
    assert said.endswith(f"; it was looked for in {folder.resolve()}\n")
    monkeypatch.chdir(folder / "elsewhere")
    said = refused("run", "../recipe.yml", "--dry-run")
    assert "recipe.yml, line 1: ../tuned: there is no such file or folder" in said
    assert said.endswith(f"; it was looked for in {folder.resolve()} or {folder.resolve() / 'elsewhere'}\n")
    said = refused("run", "../recipe.yml", "--set", "models.1=tuned1", "--dry-run")
    assert said.startswith("Error: --set models.1: tuned1: there is no such file or folder")
    assert said.endswith(f"; it was looked for in {folder.resolve() / 'elsewhere'}\n")
    said = refused("run", "../recipe.yml", "--set", "models.1=/none/here", "--dry-run")
    assert said == "Error: --set models.1: /none/here: there is no such file or folder\n"


def test_a_path_of_the_working_folder_is_read_where_it_is_unambiguous(folder: Path) -> None:
    (folder / "recipes").mkdir()
    recipe = folder / "recipes" / "mean.yml"
    recipe.write_text("models:\n- tuned0\n- tuned1\nmethod: linear\n")
    done = ok("run", recipe, "-o", "out")
    assert "mean.yml, line 2: tuned0 is not in the recipe's folder: tuned0 in the working folder is read" in done.stderr
    (folder / "recipes" / "tuned0").symlink_to(folder / "tuned0")
    assert "line 2" not in ok("run", recipe, "-o", "out", "--overwrite").stderr
    save(folder / "recipes" / "tuned1", model(9))
    message = refused("run", recipe, "-o", "other")
    assert "mean.yml, line 3: tuned1 is both in the recipe's folder and in the working folder" in message
    assert f"{folder / 'recipes' / 'tuned1'} or {folder / 'tuned1'}" in message


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", "hf://org/name/a.safetensors", "/there/a", "~/a"])
def test_other_names_stay_as_they_are(folder: Path, name: str) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mean.yml").write_text(f"models: [{name}]\nmethod: linear\nbase: {name}\n")
    recipe = read_recipe(folder / "recipes" / "mean.yml").recipe
    assert (recipe.models, recipe.base) == ((name,), name)


def test_a_recipe_from_standard_input(folder: Path) -> None:
    command = [sys.executable, "-m", "merging", "run", "-", "-o", "out", "--set", "parameters.scale=0.5"]
    done = subprocess.run(command, input=TIES, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scale: 0.5" in (folder / "out" / "README.md").read_text()
    done = subprocess.run(command, input="models: [a\n", cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: standard input, line 2: is not valid YAML")
    done = subprocess.run(command, input=b"#" * (1 << 20) + b"#\n", cwd=folder, capture_output=True)
    assert b"standard input: is larger than 1 MiB" in done.stderr


@pytest.mark.parametrize("given", ["<(cat)", "/dev/stdin", "/dev/stdin < recipe.yml"])
def test_a_recipe_from_a_pipe(folder: Path, given: str) -> None:
    (folder / "recipe.yml").write_text(TIES)
    command = f"{shlex.quote(sys.executable)} -m merging run --recipe-only {given}"
    done = subprocess.run(["bash", "-c", command], input=TIES, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == parse_recipe(TIES, "recipe").recipe.to_yaml()


# ---- lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIES + "  desnity: 1\n", "recipe, line 10: no method of 'ties' has a parameter 'desnity'"),
        (TIES.replace("0.3", "few"), "recipe, line 8: ties.density = 'few'"),
        (TIES.replace("[1, 2]", "[1, x]"), "recipe, line 7: ties.weights = 'x'"),
        (TIES.replace("ties\n", "tise\n"), "recipe, line 5: there is no method 'tise' (did you mean 'ties'?)"),
        (TIES.replace("- tuned1", "- 3"), "recipe, line 3: models.1 = 3: should be text"),
        (TIES + "bsae: base\n", "recipe, line 10: there is no 'bsae' (did you mean 'base'?)"),
        (TIES + "rank: 0\n", "recipe, line 10: rank = 0: should be at least 1"),
        (TIES.replace("method", "metod"), "recipe, line 5: there is no 'metod' (did you mean 'method'?)"),
        (TIES.replace("models", "model"), "recipe, line 1: there is no 'model' (did you mean 'models'?)"),
        ("method: ties\n", "recipe: the recipe has no 'models'"),
        (TIES + "  density: 1\n", "recipe, line 10: ties.density and density are the same parameter"),
        (TIES + "base_model: base\n", "recipe, line 10: there is no 'base_model'"),
    ],
)
def test_errors_state_the_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_recipe(text, "recipe")
    assert str(caught.value).startswith(message)


# ---- values from the command line


def changed(*settings: str, text: str = TIES) -> Recipe:
    return parse_recipe(text, "recipe", [parse_setting(each) for each in settings]).recipe


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("scale=0.5", {"parameters": {"scale": 0.5}}),
        ("parameters.scale=0.2:0.8:1", {"parameters": {"scale": "0.2:0.8:1"}}),
        ("models.1=other", {"models": ["tuned0", "other"]}),
        ("models=[a, b, c]", {"models": ["a", "b", "c"], "parameters": {"weights": [1, 2]}}),
        ("weights.0=-3", {"parameters": {"weights": [-3, 2]}}),
        ("density.mlp=0.4", {"parameters": {"density": {"mlp": 0.4, "*": 0.2}}}),
        ("ties.density.*=[0.1, 0.5]", {"parameters": {"density": {"mlp": 0.3, "*": [0.1, 0.5]}}}),
        ("density=0.7", {"parameters": {"density": 0.7}}),
        ('density={embed: 1, "*": 0.5}', {"parameters": {"density": {"embed": 1, "*": 0.5}}}),
        ("base=", {"base": None}),
        ("dtype=float16", {"dtype": "float16"}),
        ("as=model", {"as": "model"}),
        ("kind=model", {"as": "model"}),
        ("exclude=[embed, head]", {"exclude": ["embed", "head"]}),
    ],
)
def test_one_value_changes(setting: str, changes: dict[str, object]) -> None:
    facts, before = changed(setting).to_dict(), changed().to_dict()
    wanted = {**before, **changes, "parameters": {**before["parameters"], **changes.get("parameters", {})}}  # type: ignore[dict-item]
    assert facts == {key: value for key, value in wanted.items() if value is not None}


def test_a_method_is_set_before_its_parameters() -> None:
    recipe = changed("t=0.25", "method=slerp", text="models: [a, b]\nmethod: linear\nbase: c\n")
    assert recipe.to_dict()["parameters"] == {"t": 0.25}


def test_a_name_with_dots_in_a_mapping() -> None:
    text = 'models: [a]\nmethod: linear\nparameters: {weights: {model.layers.1: 1, "*": 2}}\n'
    recipe = changed("weights.model.layers.1=5", text=text)
    assert recipe.to_dict()["parameters"] == {"weights": {"model.layers.1": 5, "*": 2}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scale", "--set scale: is no setting: write KEY=VALUE, such as scale=0.5"),
        ("=1", "is no setting"),
        ("scale=[1", "--set scale: is not valid YAML"),
        ("scael=1", "--set scael: neither the recipe nor ties has 'scael' (did you mean 'scale'?)"),
        ("modles.1=x", "neither the recipe nor ties has 'modles' (did you mean 'models'?)"),
        ("parameters.desnity=1", "(did you mean 'density'?)"),
        ("t=0.5", "--set t: 't' is a parameter of "),
        ("models.2=x", "--set models.2: models is a list, whose values are models.0 to models.1"),
        ("models.one=x", "models is a list, whose values are models.0 to models.1"),
        ("density.mpl=1", "--set density.mpl: parameters.ties.density has no 'mpl' (did you mean 'mlp'?)"),
        ("density.norm=1", "parameters.ties.density has no 'norm': it has mlp, *"),
        ("base.name=1", "--set base.name: base is 'base', so there is nothing below it: set base itself"),
        ("scale.mlp=1", "parameters.scale is not in the recipe, so there is nothing below it"),
        ("scale=much", "--set scale: ties.scale = 'much'"),
        ("rank=many", "--set rank: rank = 'many': should be a whole number"),
    ],
)
def test_settings_that_are_refused(setting: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        changed(setting)
    assert message in str(caught.value)


def test_parameters_that_are_no_mapping_are_not_replaced() -> None:
    text = "models: [a]\nmethod: linear\nparameters: [1]\n"
    with pytest.raises(OptionError, match=r"--set weights: parameters should be a mapping of names to values"):
        changed("weights=2", text=text)
    assert changed("parameters={weights: 2}", text=text).to_dict()["parameters"] == {"weights": 2}


def test_settings_are_shown_and_recorded(folder: Path) -> None:
    (folder / "recipe.yml").write_text(TIES)
    words = ["run", "recipe.yml", "--set", "scale=0.5", "--set", "models.1=tuned0"]
    shown = ok(*words, "--dry-run").stdout
    assert "\n  set     scale=0.5\n  set     models.1=tuned0\n  reads " in shown
    assert json.loads(ok(*words, "--dry-run", "--json").stdout)["set"] == ["scale=0.5", "models.1=tuned0"]
    assert "set" not in json.loads(ok("run", "recipe.yml", "--dry-run", "--json").stdout)
    printed = yaml.safe_load(ok(*words, "--recipe-only").stdout)
    assert (printed["models"], printed["parameters"]["scale"]) == (["tuned0", "tuned0"], 0.5)
    ok(*words, "-o", "out")
    card = (folder / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == printed


# ---- examples


def test_help_shows_whole_recipes() -> None:
    shown = ok("run", "--help").stdout
    for text in (SMALL_RECIPE, FULL_RECIPE):
        assert all(f"  {line}\n" in shown for line in text.splitlines())
        assert parse_recipe(text, "help").recipe.method
