"""Which room of the package imports which, held against the syntax tree of every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import merging
from support.for_all import for_all
from support.paths import ROOT


def _files() -> dict[str, Path]:
    """Every module by its full name; cli/ is installed as merging.cli."""
    found = {}
    for folder, package in (("merging", "merging"), ("cli", "merging.cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = _files()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Import:
    """A module that a file imports: when the file is imported itself, or only inside a function."""

    module: str
    lazy: bool


@cache
def imports(name: str) -> list[Import]:
    """What a module imports, in full names; imports for type checkers do not count."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
                module = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([module] if module else [])]
                )
            inner = [f"{module}.{alias.name}" for alias in node.names]
            found.extend(Import(each if each in FILES else module, lazy) for each in inner)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child, lazy)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(tree(name), False)
    return found


def under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "file_ranges", "os_calls", "version"),
    ("display", "type_checks"),
    ("cluster", "maths"),
    ("methods", "object_stores", "sources"),
    ("hub", "storage"),
    ("plan", "report"),
    ("engine", "output", "serving"),
    ("api", "geometry"),
    ("compression", "continual", "moe", "pool", "soups", "testing"),
    ("recycling", "statistics"),
    ("searches",),
    ("cli",),
)
"""The rooms of the package from the ground up: folders, and the files at its root."""

PURE = {
    "__future__",
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "fnmatch",
    "functools",
    "hashlib",
    "importlib",
    "inspect",
    "itertools",
    "math",
    "re",
    "typing",
}
LAZY_TORCH = "merging.maths.lazy_torch"
NEVER: dict[str, tuple[str, ...]] = {
    "cluster": ("click", "torch", "transformers"),
    "hub": ("click", "transformers"),
    "methods": ("click", "transformers"),
    "moe": ("click",),
    "object_stores": ("click", "torch", "transformers"),
    "sources": ("click", "transformers"),
    "storage": ("click", "transformers"),
    "plan": ("click",),
    "engine": ("click", "transformers", "yaml", "merging.storage.staging", "merging.storage.writer"),
    "api": ("click",),
    "compression": ("click",),
    "continual": ("click",),
    "geometry": ("click",),
    "output": ("click",),
    "pool": ("click",),
    "recycling": ("click",),
    "searches": ("click", "transformers"),
    "report": ("click",),
    "serving": ("click",),
    "soups": ("click",),
    "statistics": ("click",),
}
NEVER_AT_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("api", "compression", "continual", "engine", "geometry", "output"), ("transformers",)),
    **dict.fromkeys(("moe", "pool", "recycling", "report", "serving", "soups", "statistics"), ("transformers",)),
    "plan": ("transformers", "huggingface_hub"),
    "cli": ("torch", "safetensors", "numpy", "transformers", "pydantic", "tqdm", "yaml"),
}


def room_of(name: str) -> str:
    """The folder of the package that a module is in, or its own name at the root; "" for the package itself."""
    return "" if name in ("merging", "merging.__main__") else name.split(".")[1]


def modules(room: str) -> list[str]:
    return [name for name in FILES if room_of(name) == room]


def test_every_room_has_a_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(FILES) > 200
    assert sorted(rooms) == sorted({room_of(name) for name in FILES} - {""})
    assert len(FLOORS) <= 12
    assert len(list((ROOT / "merging").glob("*.py"))) <= 7


def test_imports_are_found() -> None:
    """The tests below would pass if nothing were."""
    assert Import("merging.errors", False) in imports("merging.storage.staging")
    assert Import("merging.os_calls", False) in imports("merging.storage.staging")
    assert Import("merging.cli.errors", False) in imports("merging.cli.merge")
    assert Import("merging.plan.recipe_values", True) in imports("merging.cli.merge")
    assert Import("merging.plan.recipe_values", False) not in imports("merging.cli.merge")
    assert Import("huggingface_hub", True) in imports("merging.plan.stacks")


@for_all([name for name in FILES if room_of(name)])
def test_no_import_runs_up(name: str) -> None:
    """At import or lazily, a file imports from its own room and from the floors below it."""
    floors = {room: height for height, floor in enumerate(FLOORS) for room in floor}
    for each in imports(name):
        if under(each.module, "merging") and room_of(each.module) not in ("", room_of(name)):
            assert floors[room_of(each.module)] < floors[room_of(name)], each


def test_no_two_files_import_each_other() -> None:
    used = {name: {each.module for each in imports(name)} & FILES.keys() - {name} for name in FILES}
    assert {(one, other) for one in used for other in used[one] if one < other and one in used[other]} == set()


@for_all(modules("maths") + modules("methods") + modules("errors"))
def test_maths_imports_nothing_but_maths(name: str) -> None:
    """No files, no devices, no logging: torch, pydantic, the standard library's maths, and itself."""
    allowed = PURE | ({"contextlib", "difflib"} if room_of(name) == "errors" else {"torch", "pydantic"})
    if name == LAZY_TORCH:
        allowed |= {"pydantic_core", "sys", "types"}
    if under(name, "merging.maths.kernels"):
        allowed |= {
            "contextlib",
            "ctypes",
            "hashlib",
            "llvmlite",
            "logging",
            "numba",
            "numpy",
            "os",
            "pathlib",
            "threading",
        }
    for each in imports(name):
        if under(each.module, "merging"):
            assert room_of(each.module) in ("maths", "methods", "display", "errors", "type_checks"), each
        else:
            assert each.module.partition(".")[0] in allowed, each


@for_all([name for room in NEVER for name in modules(room)])
def test_never_imported(name: str) -> None:
    for each in imports(name):
        assert not under(each.module, *NEVER[room_of(name)]), each


@for_all([name for room in NEVER_AT_IMPORT for name in modules(room)])
def test_never_imported_at_import_time(name: str) -> None:
    for each in imports(name):
        assert each.lazy or not under(each.module, *NEVER_AT_IMPORT[room_of(name)]), each


@for_all(
    [name for name in FILES if name != "merging.maths.lazy_torch" and room_of(name) not in ("recycling", "searches")]
)
def test_torch_is_imported_when_it_is_used(name: str) -> None:
    """So that commands that only read headers answer at once."""
    eager = [each.module for each in imports(name) if not each.lazy and under(each.module, "torch", "transformers")]
    assert not eager, f"from merging.maths.lazy_torch import Tensor, torch, instead of importing {eager[0]} in {name}"


@for_all(FILES)
def test_no_name_hides_the_function_that_makes_it(name: str) -> None:
    """In a function, ``view = view(x)`` fails at run time, and neither linter nor type checker says so."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            assert ast.unparse(node.value.func) not in [ast.unparse(target) for target in node.targets], node.lineno


def test_no_module_needs_torch_to_be_imported() -> None:
    running = (
        "merging.pool.smoke",
        "merging.recycling",
        "merging.searches",
    )  # these run models, and are imported when they do
    names = [name for name in FILES if not name.startswith(running) and not name.endswith("__main__")]
    code = (
        f"import sys; sys.modules['torch'] = None; from importlib import import_module; [*map(import_module, {names})]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@for_all(modules("cli"))
def test_the_command_line_imports_the_package_when_it_runs(name: str) -> None:
    eager = [each.module for each in imports(name) if not each.lazy and under(each.module, "merging")]
    assert all(under(each, "merging.cli", "merging.display", "merging.errors", "merging.version") for each in eager), (
        eager
    )


@for_all([name for name in FILES if name not in ("merging.__main__", "merging.cli")])
def test_public_names_are_there(name: str) -> None:
    """Every module says what it offers, and has it."""
    module = import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_public_names_of_the_package() -> None:
    """All of them, lazy ones too; what is not there is refused."""
    assert set(merging.__all__) == set(dir(merging))
    assert set(merging._WHERE) <= set(merging.__all__)
    assert merging.merge is import_module("merging.api.merge_files").merge
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = merging.nothing  # type: ignore[attr-defined]


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from merging import *", names)
    assert set(merging.__all__) <= set(names)


def test_importing_the_package_brings_no_torch() -> None:
    script = "import sys, merging, merging.methods; print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@for_all(FILES)
def test_files_stay_short(name: str) -> None:
    """One that grows becomes a folder."""
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 320


def functions(name: str) -> Iterator[ast.FunctionDef]:
    """The functions of a file, methods among them."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            yield node


def positional(function: ast.FunctionDef) -> int:
    """How many arguments a function takes by their position, without self."""
    taken = [*function.args.posonlyargs, *function.args.args]
    return sum(each.arg not in ("self", "cls") for each in taken)


@pytest.mark.parametrize("room", ["api", "engine", "maths", "plan"])
def test_arguments_have_names(room: str) -> None:
    """Nobody reads the sixth argument of a call by its position."""
    for name in modules(room):
        if under(name, "merging.maths.kernels"):
            continue  # compiled functions take their arguments by position alone
        assert {each.name: positional(each) for each in functions(name) if positional(each) > 5} == {}, name
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call):
                assert len(node.args) <= 5, f"{name}, line {node.lineno}: {ast.unparse(node)}"


def test_parameters_are_few() -> None:
    """Commands, which click calls by name, may have more."""
    others = [name for name in FILES if room_of(name) != "cli" and not under(name, "merging.maths.kernels")]
    assert {(name, each.name) for name in others for each in functions(name) if positional(each) > 8} == set()


def test_no_two_classes_share_a_name() -> None:
    """Type aliases count as classes; a class may be exported by its package under a shorter name."""
    found: dict[str, list[str]] = {}
    for name in FILES:
        for node in tree(name).body:
            defined = node.name if isinstance(node, ast.ClassDef) else alias(node)
            if defined:
                found.setdefault(defined, []).append(name)
    assert len(found) > 300
    assert {defined: names for defined, names in found.items() if len(names) > 1} == {}


def alias(node: ast.stmt) -> str | None:
    """The name of a type alias (``Shape = tuple[int, ...]``) that a statement defines."""
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
        return None
    name = node.targets[0].id
    named = re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) and isinstance(node.value, ast.Subscript | ast.BinOp)
    return name if named else None


ENGLISH = """a adapters ahead and as beats because but by comes directions for grows has if in inputs inside into is it
itself left makes may models needs of passes runs says so takes that the them then this to was weights what whose with
would"""
"""Words that follow "merge" in sentences of messages."""


def test_commands_that_messages_name_exist() -> None:
    """A message that advises a command which is not there leaves its reader with nothing."""
    named: dict[str, str] = {}
    for name in FILES:
        definitions = [
            node for node in ast.walk(tree(name)) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)
        ]
        docstrings = {ast.get_docstring(node, clean=False) for node in definitions}
        for node in ast.walk(tree(name)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text not in docstrings or room_of(name) == "cli":
                named |= dict.fromkeys(re.findall(r"\bmerge ([a-z_]+)", text), name)
    commands = import_module("merging.cli.main").cli.commands
    assert {"pool", "continual", "methods"} <= named.keys()
    assert {word: at for word, at in named.items() if word not in commands and word not in ENGLISH.split()} == {}
