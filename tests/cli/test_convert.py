"""``merge convert``: command lines, outputs and recipes of either schema, written in the other one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

import merging
from merging.errors import OptionError
from merging.plan.mergekit.conversion import to_mergekit
from support.commands import ok, refused
from support.recipe_corpus import RECIPES
from support.tiny import checkpoint, identical, load

UNSAYABLE = {
    "card-karcher-base": "karcher of mergekit merges the base as one more model",
    "card-linear-base-global-weight": "linear of mergekit merges the base as one more model",
}
"""Recipes whose base we do not merge, and mergekit does."""

UNREADABLE = {"card-slerp-other-base", "card-weight-misplaced", "docs-modules"}
"""Recipes that are refused, as the peer refuses the first two."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, tuned0 and tuned1."""
    checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - UNSAYABLE.keys() - UNREADABLE))
@pytest.mark.filterwarnings("ignore::merging.MergingWarning")
def test_the_corpus_goes_to_mergekit_and_back(name: str) -> None:
    """Each recipe of mergekit is read, written in its schema, and read again as the same."""
    recipe = merging.load_recipe(RECIPES[name].read_text(encoding="utf-8"), lenient=True)
    written = to_mergekit(recipe)
    assert to_mergekit(merging.load_recipe(written)) == written
    assert merging.load_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", UNSAYABLE)
@pytest.mark.filterwarnings("ignore::merging.MergingWarning")
def test_a_base_that_mergekit_would_merge_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=UNSAYABLE[name]):
        to_mergekit(merging.load_recipe(RECIPES[name].read_text(encoding="utf-8")))


SAID = {
    "linear a b --weights 1,3 --dtype bfloat16": """
        merge_method: linear
        models: [{model: a, parameters: {weight: 1.0}}, {model: b, parameters: {weight: 3.0}}]
        dtype: float32
        out_dtype: bfloat16""",
    "slerp a b --t '{mlp: 1:0.5:0.2 else 1, \"*\": 0.4}'": """
        merge_method: slerp
        base_model: a
        models: [{model: a}, {model: b}]
        parameters: {t: [{filter: mlp, value: [1.0, 0.5, 0.2]}, {value: 0.4}]}""",
    "ties a b --base c --density 0.3,0.4 --scope tensor --vote weighted --zero plus": """
        merge_method: ties
        base_model: c
        models:
        - {model: a, parameters: {weight: 1.0, density: 0.3}}
        - {model: b, parameters: {weight: 1.0, density: 0.4}}""",
    "dare_linear a b --base c --drop 0.25": """
        merge_method: dare_linear
        base_model: c
        models: [{model: a, parameters: {weight: 1.0}}, {model: b, parameters: {weight: 1.0}}]
        parameters: {density: 0.75}""",
    "nuslerp a b --axis columns": """
        merge_method: nuslerp
        models: [{model: a, parameters: {weight: 1.0}}, {model: b, parameters: {weight: 1.0}}]
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}""",
    "model_stock org/a@abc org/b org/c --base org/d": """
        merge_method: model_stock
        base_model: org/d
        models: [{model: org/a@abc}, {model: org/b}, {model: org/c}]""",
    "linear a+b 'c@d'": """
        merge_method: linear
        models:
        - {model: {model: {path: a+b}}, parameters: {weight: 1.0}}
        - {model: {model: {path: c@d}}, parameters: {weight: 1.0}}""",
}


@pytest.mark.parametrize("words", SAID)
def test_a_command_line_in_mergekits_schema(words: str) -> None:
    done = ok("convert", f"merge --method {words}", "--to", "mergekit")
    assert yaml.safe_load(done.stdout) == yaml.safe_load(SAID[words])


REFUSED = {
    "lines+ties a b --base c": "mergekit has no method lines+ties: its methods are linear, slerp",
    "ties a b --base c --density 0.3": "mergekit cannot say parameters.scope = 'model': there it is 'tensor'",
    "ties a b --base c --scope tensor --vote weighted": "mergekit cannot say parameters.zero =",
    "linear a b --exclude norm": "mergekit has no exclude: leave it out of the recipe",
    "linear a b --quantize fp8": "mergekit has no quantize: leave it out of the recipe",
    "linear a b --quantize none": "mergekit has no quantize: leave it out of the recipe",
    "linear a b --dequantize": "mergekit has no dequantize: leave it out of the recipe",
    "linear a b --as adapter": "mergekit has no as: leave it out of the recipe",
    "slerp a b --t 0.2:0.8": "before and after the blocks a gradient of mergekit has its first value",
    'slerp a b --t \'{"*.mlp.*": 0.2, "*": 1}\'': "a filter of mergekit is a part of a name, without wildcards",
    "dare+ties a b --base c": "dare.rescale: mergekit has no value like 'inverse'",
    "dare_ties a b --base c --seed 7": "mergekit cannot say parameters.seed = 7: there it is 0",
    "linear hf://org/a/part b": "mergekit reads whole repositories of the Hub",
    "slerp a b --base c": "slerp of mergekit merges a base and one model",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_mergekit_cannot_say_is_named(words: str) -> None:
    assert REFUSED[words] in refused("convert", f"merge --method {words}", "--to", "mergekit")


def test_quantize_is_named_as_the_recipe_says_it(tmp_path: Path) -> None:
    for value in ("keep", "none"):
        (tmp_path / "recipe.yml").write_text(f"models: [a, b]\nmethod: linear\nquantize: {value}\n")
        assert "mergekit has no quantize: leave it" in refused("convert", tmp_path / "recipe.yml", "--to", "mergekit")


def test_a_command_line_becomes_a_recipe(folder: Path) -> None:
    words = "merge -m ties --base base tuned0 tuned1 --density 0.4"
    ok("convert", words, "-o", "recipes/ties.yml")
    assert yaml.safe_load((folder / "recipes/ties.yml").read_text())["models"] == ["../tuned0", "../tuned1"]
    ok("run", "recipes/ties.yml", "-o", "out")
    ok(*shlex.split(words)[1:], "-o", "other")
    assert identical(load(folder / "out"), load(folder / "other"))
    assert "exists already" in refused("convert", words, "-o", "recipes/ties.yml")
    ok("convert", words, "-o", "recipes/ties.yml", "--overwrite")


def test_a_command_line_that_runs_a_recipe_becomes_one(folder: Path) -> None:
    (folder / "ours.yml").write_text("models: [tuned0, tuned1]\nmethod: linear\n")
    changed = ok("convert", "merge run ours.yml --set weights=[1,3]").stdout
    assert yaml.safe_load(changed)["parameters"] == {"weights": [1, 3]}
    stacked = ok("convert", "merge stack tuned0 0:2 tuned1 1:3", "--to", "mergekit").stdout
    assert [each["sources"][0]["layer_range"] for each in yaml.safe_load(stacked)["slices"]] == [[0, 2], [1, 3]]


def test_an_output_becomes_a_recipe(folder: Path) -> None:
    ok("--method", "slerp", "tuned0", "tuned1", "--t", "0.3", "-o", "out")
    assert ok("convert", "out").stdout == ok("convert", "out/README.md").stdout
    assert "merge_method: slerp" in ok("convert", "out", "--to", "mergekit").stdout


def test_stages_become_documents(folder: Path) -> None:
    text = "models: [{models: [tuned0, tuned1], method: linear}, base]\nmethod: slerp\nparameters: {t: 0.4}\n"
    (folder / "tree.yml").write_text(text)
    written = list(yaml.safe_load_all(ok("convert", "tree.yml", "--to", "mergekit").stdout))
    assert [each.get("name") for each in written] == ["stage-1", None]
    assert written[1]["base_model"] == "stage-1"


def test_layers_become_slices(folder: Path) -> None:
    text = "stack: [{model: tuned0, layers: 0:2}, {model: tuned1, layers: 1:3, scale: {up_proj: 0, '*': 1}}]\n"
    (folder / "stack.yml").write_text(text)
    (written,) = yaml.safe_load_all(ok("convert", "stack.yml", "--to", "mergekit").stdout)
    assert written["merge_method"] == "passthrough"
    assert written["slices"] == [
        {"sources": [{"model": "tuned0", "layer_range": [0, 2]}]},
        {
            "sources": [
                {
                    "model": "tuned1",
                    "layer_range": [1, 3],
                    "parameters": {"scale": [{"filter": "up_proj", "value": 0}, {"value": 1}]},
                }
            ]
        },
    ]


def test_what_is_no_recipe_is_refused(folder: Path) -> None:
    assert "there is no such file" in refused("convert", "nothing.yml")
    assert "states no recipe" in refused("convert", "tuned0")
    assert "'one: is no command line: no closing quotation" in refused("convert", "merge -m linear 'one")
    assert "No such option '--densty'" in refused("convert", "merge -m ties a --densty 1", code=2)
