"""Public functions show their parameters, types and a working example to people, editors and type checkers."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import merging
from merging.api.options import MergeOptions, MethodParameters

SHOWN = (
    "load_recipe",
    "merge",
    "merge_deltas",
    "merge_peft",
    "merge_state_dicts",
    "peft_deltas",
    "peft_state_dict",
)


@pytest.mark.parametrize("name", SHOWN)
def test_examples_run(
    name: str, workplace: Callable[[Path], Path], small_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace(small_models)
    function = getattr(merging, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples
    done = doctest.DocTestRunner(verbose=False).run(test)
    assert done.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", SHOWN)
def test_signatures_are_real(name: str) -> None:
    """Every parameter is named and typed, and described in the docstring."""
    function = getattr(merging, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            assert parameter.annotation in ("Unpack[MergeOptions]", "Unpack[MethodParameters]")
        assert f"{parameter.name}:" in (function.__doc__ or "")
    assert MethodParameters.__annotations__.keys() <= MergeOptions.__annotations__.keys()
