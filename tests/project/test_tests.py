"""What holds of the tests themselves: each asserts something, none imports another, and their files stay short."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from support.for_all import for_all
from support.paths import ROOT, TESTS

FILES = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.name.startswith("test_")}
ASSERTING = ("assert_", "check_")
"""How the names of helpers begin that assert something."""


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def asserts(function: ast.FunctionDef) -> bool:
    """Whether a function has an assert, expects an error or a warning, or calls a helper that asserts."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("raises", "warns") or called.lstrip("_").startswith(ASSERTING):
                return True
    return False


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_tests_are_found() -> None:
    """The tests below would pass if none were."""
    assert len(MODULES) > 80
    assert sum(len(list(functions(tree(name)))) for name in MODULES) > 1000


@for_all(MODULES)
def test_every_test_asserts_something(name: str) -> None:
    assert [function.name for function in functions(tree(name)) if not asserts(function)] == []


@for_all(FILES)
def test_no_file_imports_a_test_module(name: str) -> None:
    """What two of them need is in tests/support."""
    known = {Path(each).stem for each in MODULES}
    assert [each for each in imported(tree(name)) if known & set(each.split("."))] == []


@for_all(FILES)
def test_no_file_is_skipped_for_want_of_a_package(name: str) -> None:
    """All that a test imports is required by the extra `dev`: an import that fails is a failure."""
    calls = (node.func for node in ast.walk(tree(name)) if isinstance(node, ast.Call))
    assert "importorskip" not in {getattr(called, "attr", getattr(called, "id", "")) for called in calls}


@for_all(FILES)
def test_files_stay_short(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 500


def test_no_script_hides_a_module_of_python() -> None:
    """A script's own folder comes first: a file profile.py next to it is imported in place of Python's."""
    scripts = [path for folder in ("tests", "docs", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in scripts if path.stem in sys.stdlib_module_names] == []
