"""Recipes in recipes, and stacks of layers: as text, their paths, their lines in errors, and values changed in them."""

from __future__ import annotations

from pathlib import Path

import pytest

import merging
from merging.errors import InputError, OptionError
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import LoadedRecipe, parse_recipe, read_recipe
from merging.plan.recipe_settings import parse_setting

TREE = """\
models:
- one
- {model: two, layers: 0:8}
- models:
  - x
  - models: [lora]
    base: y
    method: task_arithmetic
    as: model
  method: ties
  base: b
  parameters:
    density: 0.3
- stack:
  - {model: a, layers: 0:24}
  - {model: {models: [c, d], method: linear}, layers: "8:32", scale: {o_proj: 0, "*": 1}}
base: {stack: [q], dtype: float32}
method: linear
"""

STACK = """\
stack:
- {model: a, layers: 0:2}
- b
dtype: bfloat16
"""


def loaded(text: str, *settings: str) -> LoadedRecipe:
    return parse_recipe(text, "recipe", [parse_setting(each) for each in settings])


def test_what_entries_are() -> None:
    one, two, ties, stack = loaded(TREE).recipe.models
    assert one == "one"
    assert isinstance(two, merging.LayerStack)
    assert two.parts == (merging.LayerPart(model="two", layers="0:8"),)
    assert isinstance(ties, Recipe)
    assert isinstance(ties.models[1], Recipe)
    assert (ties.method.chain, ties.models[1].kind, ties.models[1].models) == ("ties", "model", ("lora",))
    assert isinstance(stack, merging.LayerStack)
    assert [part.layers for part in stack.parts] == ["0:24", "8:32"]
    assert isinstance(stack.parts[1].model, Recipe)


@pytest.mark.parametrize("text", [TREE, STACK, "models: [{stack: [a]}]\nmethod: linear\n", "stack: [{model: a}]\n"])
def test_round_trips(text: str) -> None:
    recipe = loaded(text).recipe
    again = merging.load_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert Recipe(models=recipe.models, method=recipe.method, base=recipe.base, dtype=recipe.dtype) == (recipe)


def test_a_stack_by_itself_stays_short() -> None:
    recipe = loaded(STACK).recipe
    assert recipe.method.chain == "passthrough"
    assert recipe.to_dict() == {"stack": [{"model": "a", "layers": "0:2"}, {"model": "b"}], "dtype": "bfloat16"}
    nested = loaded("models: [a, {models: [{stack: [b, c]}], method: passthrough}]\nmethod: linear").recipe
    assert isinstance(nested.models[1], Recipe)
    assert merging.load_recipe(nested.to_yaml()) == nested


def test_entries_in_python() -> None:
    inner = merging.load_recipe("{models: [b, c], method: linear}")
    by_objects = Recipe(
        models=("a", inner, merging.LayerStack(parts=({"model": "d", "layers": "0:3"},))), method="ties"
    )
    by_values = Recipe(
        models=["a", {"models": ["b", "c"], "method": "linear"}, {"model": "d", "layers": "0:3"}], method="ties"
    )
    assert by_objects == by_values
    assert "models[1]" not in str(by_objects)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TREE.replace("density: 0.3", "density: few"), "recipe, line 13: ties.density = 'few': should be a number"),
        (TREE.replace("base: y", "bsae: y"), "recipe, line 7: there is no 'bsae' (did you mean 'base'?)"),
        (TREE.replace("task_arithmetic", "task"), "recipe, line 8: there is no method 'task'"),
        (TREE.replace("8:32", "32:8"), "recipe, line 16: models.3.stack.1.layers = '32:8': is reversed"),
        (TREE.replace("0:24", "3:3"), "recipe, line 15: models.3.stack.0.layers = '3:3': is empty"),
        (TREE.replace("0:24", "24"), "recipe, line 15: models.3.stack.0.layers = 24: should be a range of blocks"),
        (TREE.replace("0:24", "'-1:3'"), "recipe, line 15: models.3.stack.0.layers = '-1:3': should be a range"),
        (TREE.replace("{o_proj: 0", "{o_proj: x"), "recipe, line 16: models.3.stack.1.scale"),
        (TREE.replace("layers: 0:8", "layres: 0:8"), "recipe, line 3: models.1 has no 'layres' (did you mean 'layers'"),
        (
            TREE.replace("model: two, ", ""),
            "recipe, line 3: models.1 has no 'model': model, layers, scale are its keys",
        ),
        (TREE.replace("- one", "- 1"), "recipe, line 2: models.0 = 1: should be text, a recipe with models and"),
        (TREE.replace("[q]", "q"), "recipe, line 17: stack should be a list of parts"),
        (TREE.replace("[q]", "[]"), "recipe, line 17: stack should be a list of parts"),
        (TREE.replace("[q]", "[7]"), "recipe, line 17: stack.0 = 7: should be {model: NAME, layers: 0:8}"),
        (TREE.replace("base: b", "base_model: b"), "recipe, line 11: there is no 'base_model'"),
        (TREE.replace("  method: ties\n", ""), "recipe, line 4: the recipe has no 'method'"),
        (STACK + "models: [c]\n", "recipe, line 1: a recipe has either models or a stack, and this one has both"),
        (STACK + "scale: 2\n", "recipe, line 5: 'scale' is a parameter: write it under parameters"),
    ],
)
def test_errors_state_the_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        loaded(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n- models: [b]\n  method: ties\n  base: c\n  parameters:\n    density: 0.1\n\n    weights: [1, 2]\n"
         "method: linear\n", "recipe, line 8: weights has 2 values for 1 models"),
        ("models: [a, b, c]\nmethod: slerp\n", "recipe, line 1: slerp merges 2 models, and 3 were given"),
        ("method: linear\nbase:\n  models: [a]\n  method: slerp\nmodels: [b]\n", "recipe, line 3: slerp merges 2"),
        ("models:\n- a\n- stack:\n  - model: {models: [c, d], method: linear, parameters: {weights: [1]}}\n"
         "method: linear\n", "recipe, line 4: weights has 1 values"),
    ],
)  # fmt: skip
def test_a_list_of_the_wrong_length_has_a_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        loaded(text).check_counts()
    assert str(caught.value).startswith(message)


def test_paths_in_entries_are_relative_to_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("x", "a", "two"):
        (tmp_path / "recipes" / name).mkdir()
    (tmp_path / "recipes" / "tree.yml").write_text(TREE)
    monkeypatch.chdir(tmp_path)
    read = read_recipe(Path("recipes/tree.yml"))
    _, two, ties, stack = read.recipe.models
    assert isinstance(two, merging.LayerStack)
    assert isinstance(ties, Recipe)
    assert isinstance(stack, merging.LayerStack)
    assert [two.parts[0].model, ties.models[0], stack.parts[0].model] == ["recipes/two", "recipes/x", "recipes/a"]
    with pytest.raises(InputError, match=r"tree.yml, line 2: recipes/one: there is no such file or folder"):
        read.check_paths()
    text = TREE.replace("- one\n", "- x\n").replace("[lora]", "[lora/x@]")
    (tmp_path / "recipes" / "tree.yml").write_text(text)
    with pytest.raises(InputError, match=r"tree.yml, line 6: recipes/lora/x@: there is no such file"):
        read_recipe(Path("recipes/tree.yml")).check_paths()


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("models.2.models.0=z", "- x", "- z"),
        ("models.2.models.1.base=z", "base: y", "base: z"),
        ("models.2.density=0.5", "density: 0.3", "density: 0.5"),
        ("models.2.parameters.density=0.5", "density: 0.3", "density: 0.5"),
        ("models.3.stack.1.model.method=slerp", "[c, d], method: linear", "[c, d], method: slerp"),
        ("models.1.layers=1:3", "0:8", "1:3"),
        ("models.1.scale=0.5", "layers: 0:8", "layers: 0:8, scale: 0.5"),
        ("models.3.stack.1.model.models.1=z", "[c, d]", "[c, z]"),
        ("models.3.stack.1.scale.o_proj=0.5", "{o_proj: 0", "{o_proj: 0.5"),
        ("base.dtype=float16", "dtype: float32", "dtype: float16"),
        ("base=z", "base: {stack: [q], dtype: float32}", "base: z"),
        ("models.0={models: [e], method: linear}", "- one", "- {models: [e], method: linear}"),
    ],
)
def test_values_in_entries_are_set(setting: str, old: str, new: str) -> None:
    assert old in TREE
    assert loaded(TREE, setting).recipe == loaded(TREE.replace(old, new)).recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("models.2.densty=1", "neither the recipe nor ties has 'densty' (did you mean 'density'?)"),
        ("models.2.models.5=z", "models is a list, whose values are models.0 to models.1"),
        ("models.1.lyaers=1:2", "has no 'lyaers' (did you mean 'layers'?)"),
        ("models.0.models.1=z", "models.0 is 'one', so there is nothing below it: set models.0 itself"),
    ],
)
def test_settings_that_lead_nowhere(setting: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        loaded(TREE, setting)
    assert message in str(caught.value)
