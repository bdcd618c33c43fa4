"""The tokenizer's settings in recipes: the same through YAML, and refused where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import merging
from merging.errors import OptionError

WHOLE = """\
models: [a, b]
method: linear
tokenizer:
  source: base
  tokens:
    <s>: {source: a, force: true}
    x: {source: {kind: model_token, model: b, token: y}}
    y: {source: {kind: model_token, model: b, token_id: 7}}
    z: {source: {kind: zero}}
  pad_to_multiple_of: 32
chat_template: auto
"""


def test_settings_are_the_same_through_yaml() -> None:
    recipe = merging.load_recipe(WHOLE)
    assert merging.load_recipe(recipe.to_yaml()) == recipe
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens["<s>"].force
    source = recipe.tokenizer.tokens["y"].source
    assert source is not None and (source.model, source.token_id) == ("b", 7)


def test_a_name_alone_is_the_source() -> None:
    recipe = merging.load_recipe("models: [a, b]\nmethod: linear\ntokenizer: union")
    assert recipe.to_dict()["tokenizer"] == "union"
    assert recipe == merging.load_recipe("models: [a, b]\nmethod: linear\ntokenizer: {source: union}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tokenizer: {sorce: union}", "tokenizer has no 'sorce' .did you mean 'source'"),
        ("tokenizer: {tokens: {a: {source: {kind: zer}}}}", "kind = 'zer': should be 'model', 'model_token' or 'zero'"),
        ("tokenizer: {tokens: {a: {source: {kind: zero, model: a}}}}", "kind 'zero' has no 'model'"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: b}}}}", "either a 'token' or a 'token_id'"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, token: b}}}}", "needs the 'model'"),
        ("tokenizer: {tokens: {a: {forse: true}}}", "did you mean 'force'"),
        ("tokenizer: {tokens: {a: {force: true}}}", "'force' needs a 'source'"),
        ("tokenizer: {pad_to_multiple_of: 0}", "should be at least 1"),
        ("tokenizer: {pad_to_multiple_of: 9999999999999}", "should be at most 65536"),
        ("tokenizer: 3", "should be text"),
        ("chat_template: 3", "should be text"),
    ],
)
def test_wrong_settings_are_refused_with_their_line(line: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"merge.yml, line 3: .*{words}"):
        merging.load_recipe(f"models: [a, b]\nmethod: linear\n{line}", "merge.yml")


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).mkdir()
    (folder / "chat.jinja").write_text("{{ messages }}")
    text = WHOLE.replace("source: base", "source: a").replace("auto", "chat.jinja")
    (folder / "merge.yml").write_text(text)
    recipe = merging.load_recipe(folder / "merge.yml")
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == recipe.models[0] == str(folder / "a")
    assert recipe.tokenizer.tokens["<s>"].source is not None
    assert recipe.tokenizer.tokens["<s>"].source.model == str(folder / "a")
    assert recipe.chat_template == str(folder / "chat.jinja")
