"""Recipes as text: what is valid, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, MergingError, OptionError, OutputError
from support.tiny import adapters, checkpoint


def test_key_twice_in_a_recipe() -> None:
    with pytest.raises(FormatError, match="'method' stands twice"):
        merging.load_recipe("models: [a]\nmethod: linear\nmethod: slerp\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: &a [*a]\nmethod: linear", "holds itself"),  # a list in itself
        ("a: &a [1, 1]\nb: &b [*a, *a]\nmodels: [*b, *b]", "not a list of values"),  # the beginning of a billion
        ("models: [a]\nmethod: !!bool perhaps", "not valid YAML"),
        ("models: [a]\nmethod: !!int ''", "not valid YAML"),
        (f"models: [a]\nmethod: {'9' * 5000}", "not valid YAML"),
        (f"models: {'[' * 3000}", "nested too deeply"),
        ("models: [a]\nmethod: {linear: 1}", "method should be a name"),
    ],
)
def test_recipes_that_are_none(text: str, told: str) -> None:
    with pytest.raises(MergingError, match=told):
        merging.load_recipe(text)


def test_recipe_with_dates_for_names() -> None:
    assert merging.load_recipe("models: [2001-01-01]\nmethod: linear").models == ("2001-01-01",)


def test_name_of_a_model_that_is_no_unicode(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; a recipe is text."""
    path = tmp_path / "a\udcff.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(OptionError, match=r"a\\udcff.safetensors: the name is not Unicode"):
        merging.merge([path], method="linear", output=tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_recipe_from_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a file are relative to its folder, and the merge is the same as by ``merge``, bit for bit."""
    checkpoint(tmp_path / "models")
    file = tmp_path / "models" / "recipe.yml"
    file.write_text("models: [tuned0, tuned1]\nmethod: ties\nbase: base\nparameters: {density: 0.3}\ndtype: bfloat16\n")
    monkeypatch.chdir(tmp_path)
    recipe = merging.load_recipe(Path("models/recipe.yml"))
    assert recipe == merging.load_recipe("models/recipe.yml")
    assert recipe == merging.load_recipe(recipe.to_yaml())
    done = recipe.run(output="out", overwrite=True, threads=1, max_memory="500MB")
    assert done.path == Path("out")
    models = ["models/tuned0", "models/tuned1"]
    merging.merge(models, method="ties", base="models/base", density=0.3, dtype="bfloat16", output="same")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert Path("out", name).read_bytes() == Path("same", name).read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        recipe.run("out")


def test_run_passes_every_field_on(tmp_path: Path) -> None:
    """What a run makes states the recipe itself, whatever its fields are."""
    _, (one, _) = adapters(tmp_path, 2)
    recipe = merging.load_recipe(
        f"{{models: [{one}], method: task_arithmetic, rank: 1, lora_alpha: 3, exclude: [layers.0]}}"
    )
    recipe.run(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["merging_recipe"]) == recipe.to_dict()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "no", str(tmp_path / "no.yml")):
        with pytest.raises(MergingError, match=r"no(\.yml)?: "):
            merging.load_recipe(missing)
