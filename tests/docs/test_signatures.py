"""Public functions show their parameters, types and a working example to people, editors and type checkers."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import merging
from merging.api.options import MergeOptions, MethodParameters
from merging.methods import registry

WITHOUT = {
    "Delta": "is a union of two types with examples",
    "FormatError": "is a kind of MergingError, whose example catches all",
    "InputError": "is a kind of MergingError",
    "MergingWarning": "is a base of warnings",
    "OptionError": "is a kind of MergingError",
    "OutputError": "is a kind of MergingError",
    "__version__": "is a text",
    "make_moe": "is run with the models that it names by tests/moe",
}
"""Public names without an example, each with the reason."""

TRAINING = ("Found", "Recycled", "recycle", "search")
"""Names whose examples run the real base."""

SHOWN = [name for name in merging.__all__ if inspect.isfunction(getattr(merging, name))]


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """A function that runs the example of a public name, and returns the report of failures.

    A method that it declares is forgotten again.
    """

    def run(name: str) -> str:
        monkeypatch.setattr(registry, "_declared", dict(registry._declared))
        (test,) = doctest.DocTestFinder(recurse=False).find(getattr(merging, name), name, globs={})
        assert test.examples
        failed = doctest.DocTestRunner(verbose=False).run(test).failed
        return capsys.readouterr().out if failed else ""

    return run


@pytest.mark.parametrize("name", [name for name in merging.__all__ if name not in (*WITHOUT, *TRAINING)])
def test_examples_run(
    name: str, workplace: Callable[[Path], Path], small_models: Path, run_example: Callable[[str], str]
) -> None:
    workplace(small_models)
    assert run_example(name) == ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRAINING)
def test_examples_that_train_run(
    name: str, workplace: Callable[[Path], Path], real_models: Path, run_example: Callable[[str], str]
) -> None:
    workplace(real_models)
    assert run_example(name) == ""


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
            assert "Unpack[" in str(parameter.annotation) or name in ("recycle", "search")  # whose settings are a class
        assert f"{parameter.name}:" in (function.__doc__ or "")
    assert MethodParameters.__annotations__.keys() <= MergeOptions.__annotations__.keys()
