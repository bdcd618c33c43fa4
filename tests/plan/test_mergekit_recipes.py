"""Recipes of mergekit in our schema: what each key becomes, and what is refused or ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import merging
from merging.errors import MergingWarning, OptionError
from merging.methods import METHODS
from merging.plan.mergekit.methods import METHODS as THEIRS
from merging.plan.recipe_files import LoadedRecipe, parse_recipe
from support.commands import ok, refused
from support.tiny import CONFIG, fine_tune, identical, load, model, save

TIES = """\
# no parameters for the base
merge_method: ties
base_model: base
models:
  - model: base
  - model: one
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: two
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""


def read(text: str, *, lenient: bool = False) -> LoadedRecipe:
    return parse_recipe(text, "m.yml", lenient=lenient)


def recipe(method: str, parameters: str = "", *, base: str = "base", models: str = "one two", own: str = "") -> str:
    lines = [f"merge_method: {method}", f"base_model: {base}" if base else "", "models:"]
    lines += [f"- {{model: {name}, parameters: {{{own}}}}}" for name in models.split()]
    return "\n".join([*lines, f"parameters: {{{parameters}}}"])


def test_ties() -> None:
    assert read(TIES).recipe.to_dict() == {
        "models": ["one", "two"],
        "method": "ties",
        "parameters": {
            "density": ["1:0.7:0.1 else 1", 0.33],
            "weights": [1.0, {"mlp": 0.5, "*": 0.0}],
            "scope": "tensor",
            "vote": "weighted",
            "zero": "plus",
        },
        "base": "base",
        "dtype": "float16",
    }
    assert read(TIES).notices == ()


@pytest.mark.parametrize(
    ("text", "method", "parameters"),
    [
        (recipe("linear", "weight: 1"), "linear", {}),
        (recipe("linear", "weight: [true, 1]"), "linear", {}),
        (recipe("slerp", "t: '1e-3'", models="one"), "slerp", {"t": 0.001}),
        (recipe("slerp", "t: [0, 0.5, 1]", models="one base"), "slerp", {"t": "0:0.5:1 else 0"}),
        (recipe("dare_ties", "weight: 1, density: [0.53, 1]"), "dare+ties", {"drop": "0.47:0 else 0.47"}),
        (recipe("dare_linear", "weight: 1, rescale: false"), "dare+task_arithmetic", {"rescale": "none"}),
        (recipe("nuslerp", "weight: 1, nuslerp_flatten: false"), "nuslerp", {"axis": "rows", "space": "changes"}),
        (recipe("nuslerp", "weight: 1, nuslerp_row_wise: true", base=""), "nuslerp", {}),
        (recipe("passthrough", own="scale: {filter: q, value: 0}", models="one"), "passthrough", {"scale": {"q": 0}}),
        (recipe("linear", "weight: 1, normalize: [true, false]"), "linear", {"normalize": "true:false else true"}),
        # one level above fills what filters of the level below leave open
        (
            recipe("ties", "weight: [{filter: mlp, value: 3}, {value: 2}]", own="weight: {filter: q, value: 1}"),
            "ties",
            {"weights": {"q": 1, "mlp": 3, "*": 2}},
        ),
        (
            recipe("ties", "weight: [{filter: attn.q, value: 3}, {value: 2}]", own="weight: {filter: q, value: 1}"),
            "ties",
            {"weights": {"q": 1, "*": 2}},
        ),
        (recipe("task_arithmetic", "weight: 2", own="weight: {filter: '*', value: 1}"), "task_arithmetic", {}),
        # ours in the same file
        (recipe("ties", "weight: 1, scope: model"), "ties", {}),
        (recipe("lines+ties", "weight: 1, density: 0.5, lambda: 0.3"), "lines+ties", {"density": 0.5, "scale": 0.3}),
        (recipe("lines+ties", "density: 0.5", own="weight: [0.2, 0.4]"), "lines+ties", {"weights": "0.2:0.4 else 0.2"}),
        (recipe("dare_linear", "weight: 1, density: 0.5, seed: 3"), "dare+task_arithmetic", {"drop": 0.5, "seed": 3}),
        (recipe("tsv", "scale: 0.5"), "tsv", {"scale": 0.5}),
    ],
)  # fmt: skip
def test_parameters(text: str, method: str, parameters: dict[str, Any]) -> None:
    got = read(text).recipe.to_dict()
    assert got["method"] == method
    assert got.get("parameters", {}).items() >= parameters.items()


def test_every_method_is_known() -> None:
    """With the parameters that mergekit needs alone, each of its twenty methods is a chain of ours."""
    assert len(THEIRS) == 20
    for name, spec in THEIRS.items():
        models = " ".join(["one", "two", "three"][: spec.models[1] or 3])
        needed = ", ".join(f"{each}: 1" for each, parameter in spec.parameters.items() if parameter.required)
        got = read(recipe(name, needed, models=models)).recipe
        assert all(link.name in METHODS for link in got.method.links())
        every = {
            each: "true" if parameter.bounds.kind == "switch" else "1" for each, parameter in spec.parameters.items()
        }
        every |= {each: "0.5" for each in ("epsilon", "gamma", "tol") if each in every}
        given = ", ".join(f"{each}: {value}" for each, value in every.items())
        assert read(recipe(name, given, models=models)).recipe.method.chain == got.method.chain


@pytest.mark.parametrize("name", ["exclude", "rank", "as", "on_mismatch"])
def test_our_fields_in_the_same_file(name: str) -> None:
    value = {"exclude": "[embed]", "rank": "8", "as": "adapter", "on_mismatch": "base"}[name]
    got = read(f"{recipe('task_arithmetic', 'weight: 1')}\n{name}: {value}").recipe.to_dict()
    assert str(got[name]) in (value, "['embed']")


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("dtype: bfloat16", "bfloat16"),
        ("dtype: float32\nout_dtype: float16", "float16"),
        ("dtype: torch.float64", "float64"),
    ],
)
def test_types(text: str, dtype: str) -> None:
    assert read(f"{recipe('linear', 'weight: 1')}\n{text}").recipe.dtype == dtype


REVISIONS = """\
merge_method: linear
models:
- model: org/one@v1
- model: {path: org/two, revision: abc}
- model: {model: {path: org/three, revision: 2024}}
- {model: {model: org/four}}
parameters: {weight: 1}
"""


def test_models() -> None:
    assert read(REVISIONS).recipe.models == ("org/one@v1", "org/two@abc", "org/three@2024", "org/four")


# ---- refused, or ignored with --lenient

WEIGHT, TWO = "      weight: 1.0", "  - model: two\n"
SWALLOWED = [
    (TIES.replace("weight: 1.0", "wieght: 1.0"), 9, "ties has no parameter 'wieght' (did you mean 'weight'?)"),
    (TIES.replace(TWO, f"{TWO}    density: 0.5\n"), 11, "a model has no key 'density': it is a parameter"),
    (TIES.replace(TWO, f"{TWO}    revision: main\n"), 11, "'revision': write it behind the model"),
    (TIES.replace("int8_mask: true", "dtype: float16"), 12, "'dtype': it is a key of the recipe itself"),
    (TIES.replace(WEIGHT, f"{WEIGHT}\n      normalize: true"), 10, "normalize of ties is one for all models"),
    (TIES + "tokeniser_source: base\n", 14, "a recipe has no key 'tokeniser_source' (did you mean 'tokenizer_source"),
    (recipe("karcher", "weight: 1", base=""), 6, "karcher has no parameter 'weight'"),
    (recipe("sce", "normalize: true"), 6, "sce has no parameter 'normalize'"),
    (TIES.replace("filter: mlp", "filter: '*mlp*'"), 11, "filter '*mlp*' matches nothing"),
    (TIES.replace("{value: 0}", "{value: 0}, {filter: q, value: 1}"), 11, "the filter 'q' takes effect nowhere"),
    (TIES.replace("filter: mlp", "filter: mlp, name: x"), 11, "a filter has no key 'name'"),
]


@pytest.mark.parametrize(("text", "line", "message"), SWALLOWED)
def test_lenient(text: str, line: int, message: str) -> None:
    """What mergekit swallows is refused, or ignored and said."""
    with pytest.raises(OptionError) as caught:
        read(text)
    assert str(caught.value).startswith(f"m.yml, line {line}: ")
    assert message in str(caught.value)
    if "'wieght'" not in message:  # else the weight is missing
        (notice,) = read(text, lenient=True).notices
        assert notice == f"{caught.value}: ignored"


def test_commands(tmp_path: Path) -> None:
    """The file is run as it is; the same recipe in our schema makes the same bytes."""
    base = model(0)
    save(tmp_path / "base", base)
    for i, name in enumerate(("one", "two")):
        save(tmp_path / name, fine_tune(base, i + 1))
    text = TIES.replace("int8_mask: true", "int8_mask: true, gamma: 1")
    (tmp_path / "m.yml").write_text(text)
    assert "m.yml, line 12: ties has no parameter 'gamma'" in refused("run", tmp_path / "m.yml", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = ok("run", tmp_path / "m.yml", "--lenient", "-o", tmp_path / "out")
    assert "line 12: ties has no parameter 'gamma'" in done.stderr
    (tmp_path / "ours.yml").write_text(ok("run", tmp_path / "m.yml", "--lenient", "--recipe-only").stdout)
    merging.load_recipe(tmp_path / "ours.yml").run(output=tmp_path / "again")
    assert identical(load(tmp_path / "out"), load(tmp_path / "again"))
    with pytest.warns(MergingWarning, match="gamma"):
        merging.load_recipe(tmp_path / "m.yml", lenient=True)


SLERP = """\
merge_method: slerp
base_model: one
models: [{model: two}]
parameters:
  t:
  - {filter: mlp, value: 1}
  - {filter: up_prj, value: 0.5}
  - value: 0.1
"""


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (SLERP, 7, "'up_prj' in slerp.t names no tensor (did you mean 'up_proj'?)"),
        (SLERP.replace("mlp", "layers").replace("up_prj", "mlp"), 7, "'mlp' in slerp.t takes effect nowhere"),
        (SLERP.replace("up_prj", "norm").replace("  - value: 0.1\n", ""), 6, "slerp: no pattern matches"),
    ],
)
def test_filters_without_effect(tmp_path: Path, text: str, line: int, message: str) -> None:
    """They are refused from the headers, with their line; with --lenient they are named, if mergekit ignores them."""
    for name in ("one", "two"):
        save(tmp_path / name, model(0))
    file, output = tmp_path / "m.yml", tmp_path / "out"
    file.write_text(text)
    assert f"m.yml, line {line}: {message}" in refused("run", file, "-o", output)
    assert not output.exists()
    if "no pattern" in message:
        assert message in refused("run", file, "-o", output, "--lenient")
    else:
        assert f"ignored: {message}" in ok("run", file, "-o", output, "--lenient").stderr


def test_a_filter_for_a_tied_head(tmp_path: Path) -> None:
    """Many recipes have one, and their models no head of their own: it is named, and not refused."""
    for name in ("one", "two"):
        tensors = {each: value for each, value in model(0).items() if "lm_head" not in each}
        save(tmp_path / name, tensors, CONFIG | {"tie_word_embeddings": True})
    file = tmp_path / "m.yml"
    file.write_text(recipe("linear", "weight: [{filter: lm_head, value: 1}, {value: 0.5}]", base=""))
    done = ok("run", file, "-o", tmp_path / "out")
    assert "note: ignored: 'lm_head' in linear.weights names no tensor" in done.stderr
