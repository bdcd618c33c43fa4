"""References hold: the roles in docstrings, the paths of modules in code and pages, and the names of files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`~?([^`]+)`")
MODULE_PATH = re.compile(r"(?<![\w./-])merging(?:\.[A-Za-z_]\w*)+")
FILE_PATH = re.compile(r"(?<![\w./-])(?:merging|tests|docs|examples)/[\w/]+\.(?:py|md|json|ipynb|yml)\b")

EXAMPLES = {"merging.sources.ties", "merging.nothing"}
"""Names that stand for what is no longer there, or never was: in the style guide's pairs and a test of the layers."""


def _files(*suffixes: str) -> list[Path]:
    folders = [ROOT / name for name in ("merging", "cli", "docs", "tests", "examples")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    return sorted([*found, *(path for path in ROOT.glob("*") if path.suffix in suffixes)])


@cache
def _resolves(dotted: str) -> bool:
    """Return whether a dotted path leads to a module, or to a name or attribute in one."""
    parts = dotted.split(".")
    if "__main__" in parts:  # importing it would run the command
        return (ROOT / "merging" / "__main__.py").is_file()
    for length in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return _has(found, parts[length:])
    return False


def _has(found: object, attributes: list[str]) -> bool:
    for number, name in enumerate(attributes):
        if not hasattr(found, name):
            fields = (vars(each).get("__annotations__", {}) for each in getattr(found, "__mro__", ()))
            return number == len(attributes) - 1 and any(name in each for each in fields)
        found = getattr(found, name)
    return True


def _docstrings(node: ast.AST, classes: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Yield every docstring, those of attributes too, with the classes around it and its line."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield classes, text, child.lineno
        yield from _docstrings(child, (*classes, child.name) if isinstance(child, ast.ClassDef) else classes)


def _imported_for_types(tree: ast.Module) -> dict[str, str]:
    """Return all names that a file imports from others, including imports for type checkers alone."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level)
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def _unresolved_roles(path: Path, module: str) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = _imported_for_types(tree)
    for classes, text, line in _docstrings(tree):
        for role in ROLE.findall(text):
            first, _, rest = role.removesuffix("()").partition(".")
            dotted = ".".join(part for part in (imported.get(first, first), rest) if part)
            inside = [".".join([module, *classes[:depth], dotted]) for depth in range(len(classes), -1, -1)]
            if not any(map(_resolves, [dotted, *inside])):
                yield f"{path.relative_to(ROOT)}:{line}: {role}"


def test_roles_in_docstrings_resolve() -> None:
    modules = {path: path.relative_to(ROOT).with_suffix("") for path in _files(".py")}
    names = {
        path: ".".join(inner.parts if inner.parts[0] == "merging" else ("merging", *inner.parts))
        for path, inner in modules.items()
        if inner.parts[0] in ("merging", "cli")
    }
    assert [each for path, name in names.items() for each in _unresolved_roles(path, name)] == []


@pytest.mark.parametrize("pattern", [MODULE_PATH, FILE_PATH], ids=["modules", "files"])
def test_paths_that_are_named_exist(pattern: re.Pattern[str]) -> None:
    unknown = [
        f"{path.relative_to(ROOT)}:{number}: {name}"
        for path in _files(".py", ".md", ".ipynb", ".toml", ".yml")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for name in pattern.findall(line)
        if name not in EXAMPLES and not (_resolves(name) if pattern is MODULE_PATH else (ROOT / name).exists())
    ]
    assert unknown == []


def test_a_reference_that_leads_nowhere_is_found() -> None:
    assert not _resolves("merging.errors." + "Nothing") and not _resolves("merging.nothing")
    assert _resolves("merging.pool.Pool.build") and _resolves("merging.serving.Verdict.findings")
