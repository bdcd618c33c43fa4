"""Slices, stages and adapters of mergekit's recipes in our schema, with the lines of their values."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import FormatError, OptionError
from merging.plan.recipe_files import LoadedRecipe, parse_recipe
from merging.plan.recipe_values import make_recipe


def read(text: str, *, lenient: bool = False) -> LoadedRecipe:
    loaded = parse_recipe(text, "m.yml", lenient=lenient)
    assert make_recipe(loaded.recipe.to_dict()) == loaded.recipe
    return loaded


STACK = """\
slices:
- sources: [{model: one, layer_range: [0, 4]}]
- sources:
  - model: two
    layer_range: [2, 4]
    parameters:
      scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]
merge_method: passthrough
dtype: bfloat16
"""


def test_a_stack_of_layers() -> None:
    loaded = read(STACK)
    assert loaded.recipe.to_dict() == {
        "stack": [
            {"model": "one", "layers": "0:4"},
            {"model": "two", "layers": "2:4", "scale": {"o_proj": 0.0, "*": 1.0}},
        ],
        "dtype": "bfloat16",
    }
    assert loaded.document.origin(("stack", 1, "scale")) == "m.yml, line 7"
    assert loaded.document.origin(("stack", 1, "model")) == "m.yml, line 4"


MERGED = """\
merge_method: slerp
base_model: one
slices:
- sources: &all
  - {model: one, layer_range: [0, 2]}
  - {model: two, layer_range: [4, 6]}
  parameters: {t: [0.1, 0.9]}
- sources:
  - {model: one, layer_range: [2, 6]}
  - {model: two, layer_range: [2, 6]}
  base_model: two
parameters: {t: 0.5}
"""


def test_slices_of_several_sources_are_merges_of_parts() -> None:
    merges: list[dict[str, Any]] = [
        {
            "models": [{"model": "one", "layers": "0:2"}, {"model": "two", "layers": "4:6"}],
            "method": "slerp",
            "parameters": {"t": "0.1:0.9 else 0.1"},
        },
        {"models": [{"model": "two", "layers": "2:6"}, {"model": "one", "layers": "2:6"}], "method": "slerp"},
    ]
    assert read(MERGED.replace("&all", "")).recipe.to_dict() == {"stack": [{"model": each} for each in merges]}
    typed = [{"model": {**each, "dtype": "float32"}} for each in merges]  # so that nothing is rounded twice
    assert read(f"{MERGED.replace('&all', '')}dtype: float32").recipe.to_dict() == {"stack": typed, "dtype": "float32"}
    one = MERGED.replace("&all", "").partition("- sources:\n  - {model: one, layer_range: [2, 6]}")[0]
    assert read(one).recipe.to_dict() == merges[0]


BASED = """\
merge_method: task_arithmetic
base_model: base
modules:
  default:
    slices:
    - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: one, layer_range: [1, 3]}
      - {model: two, layer_range: [0, 2], parameters: {weight: {filter: mlp, value: 0.1}}}
      parameters: {weight: {filter: attn, value: 0.2}}
    parameters: {weight: {filter: embed, value: 0.3}}
parameters: {weight: 0.4, lambda: 2}
"""


def test_precedence_of_source_slice_module_and_recipe() -> None:
    assert read(BASED).recipe.to_dict() == {
        "models": [{"model": "one", "layers": "1:3"}, {"model": "two", "layers": "0:2"}],
        "method": "task_arithmetic",
        "parameters": {
            "weights": [
                {"attn": 0.2, "embed": 0.3, "*": 0.4},
                {"mlp": 0.1, "attn": 0.2, "embed": 0.3, "*": 0.4},
            ],
            "scale": 2.0,
        },
        "base": {"model": "base", "layers": "0:2"},
    }


MODULES = """\
merge_method: linear
modules:
  decoder:
    models: [{model: a}, {model: b}]
    parameters: {weight: 0.3}
  encoder:
    slices:
    - sources: [{model: c, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]
    - sources: [{model: c, layer_range: [2, 4]}]
parameters: {weight: 1}
dtype: float32
"""


def test_modules_are_stacks_by_name() -> None:
    """The tensors behind all blocks come from the decoder."""
    parts = [{"model": "c", "layers": "encoder=0:2"}, {"model": "a", "layers": "encoder=2:4"}]
    last, typed = [{"model": "c", "layers": "encoder=2:4"}], {"dtype": "float32"}
    encoder = [
        {"model": {"models": parts, "method": "linear", **typed}, "layers": "encoder"},
        {"model": {"models": last, "method": "linear", **typed}, "layers": "encoder"},
    ]
    decoder = {"models": ["a", "b"], "method": "linear", "parameters": {"weights": 0.3}, **typed}
    joined = [{"model": {"stack": encoder}, "layers": "decoder=0:0"}, {"model": decoder, "layers": "decoder"}]
    loaded = read(MODULES)
    assert loaded.recipe.to_dict() == {"stack": joined, **typed}
    assert loaded.document.origin(("stack", 1, "model", "parameters", "weights")) == "m.yml, line 5"
    assert loaded.document.origin(("stack", 0, "model", "stack", 1, "model", "models", 0)) == "m.yml, line 9"


def test_a_gradient_over_one_layer() -> None:
    """There the only layer has the last point, as in mergekit."""
    text = MERGED.replace("&all", "").replace("[0, 2]", "[0, 1]").replace("[4, 6]", "[5, 6]")
    assert read(text).recipe.to_dict()["stack"][0]["model"]["parameters"] == {"t": 0.9}


def test_filters_that_name_layers() -> None:
    """They mean the layers of a model for values of its own, and else of the output; in parts layers count from 0."""
    filters = "[{filter: layers.1, value: 0.1}, {filter: 'model.layers.3.mlp', value: 0.3}, {value: 0.5}]"
    text = f"""\
merge_method: linear
slices:
- sources: [{{model: a, layer_range: [0, 2]}}]
- sources:
  - {{model: one, layer_range: [9, 12], parameters: {{weight: {filters}}}}}
  - {{model: two, layer_range: [1, 4]}}
  parameters: {{normalize: [{{filter: layers.3., value: false}}, {{value: true}}]}}
parameters: {{weight: {filters}}}
"""
    _, merge = read(text).recipe.to_dict()["stack"]
    assert merge["model"]["parameters"] == {
        "weights": [
            {"layers.1.": 0.1, "layers.2.": 0.1, "*": 0.5},  # 10 and 11 of 9 to 11
            {"layers.0.": 0.1, "model.layers.2.mlp": 0.3, "*": 0.5},  # 1 and 3 of 1 to 3
        ],
        "normalize": {"layers.1.": False, "*": True},  # 3 of 2 to 4
    }


def test_slices_without_layers() -> None:
    """At the ends they give the tensors around the blocks, as some keep an embedding or a head; else nothing."""
    text = STACK.replace("slices:", "slices:\n- sources: [{model: head, layer_range: [4, 4]}]")
    assert read(text).recipe.to_dict()["stack"][0] == {"model": "head", "layers": "0:0"}
    inner = STACK.replace("- sources:\n", "- sources: [{model: head, layer_range: [0, 0]}]\n- sources:\n")
    assert read(inner).recipe == read(STACK).recipe
    assert read(inner).notices == ("m.yml, line 3: this slice has no layers, and is left out",)
    with pytest.raises(OptionError, match=r"m\.yml, line 1: the stack has no blocks"):
        read("stack: [{model: one, layers: 0:0}]")
    with pytest.raises(OptionError, match=r"m\.yml, line 1: stack\.1 has no blocks, as only the first and the last"):
        read("stack: [{model: one, layers: 0:2}, {model: one, layers: 0:0}, {model: one, layers: 0:2}]")


BAKED: dict[str, Any] = {"models": ["lora"], "method": "task_arithmetic", "base": "one", "as": "model"}


@pytest.mark.parametrize(
    "model",
    [
        "one+lora",
        "{model: one, lora: lora}",
        "{model: {path: one}, lora: {path: lora}}",
    ],
)
def test_adapters_on_their_models(model: str) -> None:
    text = f"merge_method: linear\nmodels:\n- model: {model}\n  parameters: {{weight: 1}}\n"
    assert read(text).recipe.to_dict() == {"models": [BAKED], "method": "linear"}
    pinned = text.replace("one+lora", "org/one@v1+org/lora@v2")
    if pinned != text:
        (entry,) = read(pinned).recipe.to_dict()["models"]
        assert (entry["models"], entry["base"]) == (["org/lora@v2"], "org/one@v1")
    listed = f"merge_method: ties\nbase_model: {model}\nmodels: [{{model: {model}}}, {{model: b}}]\n"
    listed += "parameters: {weight: 1}"
    assert read(listed).recipe.to_dict()["base"] == BAKED
    assert read(listed).recipe.to_dict()["models"] == ["b"]


STAGES = """\
name: soup   # the first stage
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---

name: chain
models: [soup, c]
method: linear
...
---
merge_method: ties
base_model: base
models:
- {model: chain, parameters: {weight: 1}}
- {model: soup+lora, parameters: {weight: 1}}
tokenizer_source: chain
---
"""


def test_stages_are_nested() -> None:
    """Later documents name earlier ones, in either schema."""
    loaded = read(STAGES)
    soup = {"models": ["a", "b"], "method": "linear"}
    got = loaded.recipe.to_dict()
    assert got["models"] == [
        {"models": [soup, "c"], "method": "linear"},
        {"models": ["lora"], "method": "task_arithmetic", "base": soup, "as": "model"},
    ]
    assert got["tokenizer"] == "a"
    assert loaded.document.origin(("models", 0)) == "m.yml, line 15"
    assert loaded.document.origin(("models", 0, "models", 0, "models", 1)) == "m.yml, line 3"
    assert loaded.notices == ()
    unused = STAGES.replace("[soup, c]", "[d, c]").replace("soup+lora", "d")
    assert read(unused).notices == ("m.yml, line 1: no other document uses soup: it is not made",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STAGES.replace("name: chain", "name: soup"), "m.yml, line 7: there are two documents named 'soup'"),
        (STAGES.replace("name: chain", ""), "m.yml, line 12: 2 documents have no name"),
        (STAGES.replace("model: a", "model: chain"), "needs this document itself"),
        (STAGES.replace("name: chain", "name: 3"), "m.yml, line 7: name should be text, and is 3"),
        (STAGES.replace("model: b}]", "model: }]"), "m.yml, line 3: this entry of models names no model"),
        (STAGES.replace("ties", "tise"), "m.yml, line 12: there is no method 'tise' (did you mean 'ties'?)"),
    ],
)
def test_stages_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(text)
    assert message in str(caught.value)


def stages(count: int, models: str) -> str:
    first = "name: s0\nmodels: [a, b]\nmethod: slerp\n"
    later = [f"name: s{i}\nmodels: {models.format(f's{i - 1}')}\nmethod: slerp\n" for i in range(1, count)]
    return "---\n".join([first, *later])


def test_stages_in_a_row_and_twice() -> None:
    assert read(stages(24, "[{}, c]")).recipe.to_yaml().count("slerp") == 24
    assert read(stages(8, "[{0}, {0}]")).recipe.to_yaml().count("slerp") == 2**8 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (stages(25, "[{}, c]"), "m.yml, line 1: too many stages need each other in a row"),
        (stages(1000, "[{}, c]"), "too many stages need each other in a row"),
        (stages(20, "[{0}, {0}]"), "the stages use each other more than 500 times"),
    ],
)
def test_stages_that_would_grow_without_end(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(text)
    assert message in str(caught.value)


# ---- texts as people leave them

PAGE = f"""\
---
license: mit
base_model: [one, two]
---
# A merge

```python
models = [1]
```

```yaml
{STACK}```

As `merge run` reads it: ```
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", PAGE),
        ("r.yml", f"```yaml\n{STACK}```\n"),
        ("r.yml", f"{STACK}```\nThat was it.\n"),
        ("r.yml", f"Here it is:\n~~~\n{STACK}"),
        ("r.yml", f"\ufeff{STACK}"),
        ("r.yml", STACK.replace("\n", "\r\n")),
        ("r.yml", STACK.replace("slices:", "slices:\t# the layers").replace("through", "through\t\n\t\n\t# end")),
        ("r.yml", f"{STACK}---\nMade on a Sunday.\n"),
    ],
)  # fmt: skip
def test_a_recipe_in_a_page(name: str, text: str) -> None:
    loaded = parse_recipe(text, name)
    assert loaded.recipe == parse_recipe(STACK, "m.yml").recipe
    line = text.replace("\r", "").splitlines().index("    layer_range: [2, 4]")
    assert loaded.document.origin(("stack", 1, "model")) == f"{name}, line {line}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "# A model\n", "README.md: has no block of YAML with a recipe"),
        ("README.md", PAGE + f"```yml\n{STACK}```\n", "README.md: has several recipes, at line 11 and line 24"),
        ("r.yml", STACK.replace("  - model: two", "\t- model: two"), "r.yml, line 4: is indented by a tab"),
        ("r.yml", "- one\n- two\n", "r.yml, line 1: should be a YAML mapping"),
        ("r.yml", "merge_method: [ties\n", "r.yml, line 2: is not valid YAML"),
        ("r.yml", "", "r.yml: should be a YAML mapping"),
    ],
)
def test_texts_that_hold_no_recipe(name: str, text: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_recipe(text, name)
    assert str(caught.value).startswith(message)
