"""The typed options of the public functions are those that recipes and methods have."""

from __future__ import annotations

from typing import get_type_hints

from merging.api.options import MergeOptions, MethodParameters, RecipeOptions
from merging.methods import METHODS, method_class, parameters_of
from merging.plan.recipe import FIELDS


def test_recipe_options_are_the_fields_of_recipes() -> None:
    """But for the two that merge takes itself, and ``as``, which is no name in Python."""
    assert set(RecipeOptions.__annotations__) == FIELDS - {"models", "method", "as"}


def test_method_parameters_are_those_of_all_methods() -> None:
    """And ``elements``, which join the weights by block."""
    assert set(MethodParameters.__annotations__) == {
        "elements",
        *(parameter for name in METHODS for parameter in parameters_of(method_class(name))),
    }


def test_no_option_is_both() -> None:
    assert len(get_type_hints(MergeOptions)) == len(MethodParameters.__annotations__) + len(
        RecipeOptions.__annotations__
    )
