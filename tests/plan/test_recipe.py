"""Recipes as text: what is valid, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, MergingError, OptionError


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
