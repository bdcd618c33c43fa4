"""Plain words in code and pages: a search for the phrases and names that docs/contributing/style.md retires."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STYLE = ROOT / "docs" / "contributing" / "style.md"

RETIRED = re.compile(
    r"\b(?:brought|anew|(?:is|are)\s+told|tells|lies?\s+beside|(?:that|those)\s+of|of\s+which|for\s+ever\b|so\s+many"
    r"|which\s+of\s+(?:them|it|these|those)|the\s+one(?=\s+(?:that|which|who|whose|of|in|on|at|to|for|from|with|without"
    r"|by|it|they|there|is|was|called|named|given|before|behind|beside|under|and)\b|\s*[.,;:)\"]|\s+``))\b",
    re.IGNORECASE,
)
"""Phrases for which a noun, or a plain verb, stands from now on."""

RETIRED_NAMES = {"told", "tell", "Told"}
"""Names of progress callbacks, which are called ``progress``, or ``on_event`` where a record is handed over."""

IRREGULAR = """begun bound bought brought built caught chosen done drawn fed found given gone grown held hidden kept
known laid lain left lost made met said sent shown sought spent taken taught told torn understood written"""
"""Past participles that do not end in "ed"; those that are verbs as well (cut, put, read, run, set) are not here."""

NO_PARTICIPLES = {"embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"}
"""Words that end in "ed" and are verbs or nouns."""

ALLOWED: dict[str, str] = {
    "oriented": "a method of the changes that users hold",
    "scaled": "a method of the changes that users hold",
}
"""Functions that keep a participle as their name, each with the reason."""


def sources() -> Iterator[tuple[str, Path]]:
    """Every file that is searched, with the folder that it counts for."""
    for path in sorted((ROOT / "merging").rglob("*.py")):
        inner = path.relative_to(ROOT / "merging")
        yield inner.parts[0] if len(inner.parts) > 1 else "merging", path
    for path in sorted((ROOT / "cli").rglob("*.py")):
        yield "cli", path
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path != STYLE:  # it quotes them
            yield "docs", path
    yield "README.md", ROOT / "README.md"


def phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of every retired phrase in a text, those broken over two lines too."""
    joined = re.sub(r"\"?\n[ \t]*(?:#|>|f?\"(?!\"\"))?", lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    for match in RETIRED.finditer(joined):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match.group().split())


def opening_questions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the beginning of every docstring, also of a field or constant, that begins with "What"."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                text = str(child.value.value)
                if text.lstrip().startswith("What "):
                    yield child.lineno, text[:20]


def participles(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every function that acts and is named by a past participle alone.

    Properties and functions that return a bool may be: they say how something is.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in ALLOWED:
            continue
        word = node.name.strip("_")
        decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
        states = decorators & {"property", "cached_property"} or (node.returns and ast.unparse(node.returns) == "bool")
        participle = word in IRREGULAR.split() or (word.endswith("ed") and word not in NO_PARTICIPLES)
        if participle and "_" not in word and not states:
            yield node.lineno, node.name


def callbacks(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every parameter, function or class called as progress callbacks once were."""
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.arg | ast.keyword) else getattr(node, "name", None)
        if name in RETIRED_NAMES:
            yield node.lineno, str(name)  # type: ignore[attr-defined]


def search() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the retired phrases and the retired names of each folder, as ``FILE:LINE: WORDS``."""
    words: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for folder, path in sources():
        text = path.read_text(encoding="utf-8")
        at_fault = list(phrases(text))
        misnamed: set[tuple[int, str]] = set()
        if path.suffix == ".py":
            tree = ast.parse(text)
            at_fault += opening_questions(tree)
            misnamed |= {*participles(tree), *callbacks(tree)}
        where = path.relative_to(ROOT)
        words.setdefault(folder, []).extend(f"{where}:{line}: {found}" for line, found in sorted(at_fault))
        names.setdefault(folder, []).extend(f"{where}:{line}: {found}" for line, found in sorted(misnamed))
    return words, names


WORDS, NAMES = search()


@pytest.mark.parametrize("folder", sorted(WORDS))
def test_no_retired_phrase(folder: str) -> None:
    assert not WORDS[folder], "\n".join(WORDS[folder])


@pytest.mark.parametrize("folder", sorted(NAMES))
def test_functions_are_verbs(folder: str) -> None:
    assert not NAMES[folder], "\n".join(NAMES[folder])


def test_the_style_page_names_what_is_retired() -> None:
    """Who is refused finds the rule: the page has every phrase that is searched for."""
    page = STYLE.read_text(encoding="utf-8")
    named = {words.lower() for _, words in phrases(page)}
    assert named >= {
        "brought", "anew", "is told", "lies beside", "that of", "those of", "of which", "for ever", "so many",
        "which of them", "the one",
    }  # fmt: skip


def test_the_search_finds() -> None:
    """The tests above would pass if it found nothing."""
    assert len(WORDS) > 15
    text = "Of two, that\n    of the base, and the\n    # one that is told.\nThe one, so many."
    assert Counter(words for _, words in phrases(text)) == Counter(
        ["that of", "the one", "is told", "The one", "so many"]
    )
    assert list(phrases("The one door for every house; the ones that stay.")) == []
    tree = ast.parse('def f():\n    """What it is."""\nlimit = 1\n"""What holds."""\nclass A:\n    "A thing."')
    assert [line for line, _ in opening_questions(tree)] == [4, 2]
    tree = ast.parse("def found() -> str: ...\ndef _settled(): ...\ndef shared() -> bool: ...\ndef seed(): ...")
    assert [name for _, name in participles(tree)] == ["found", "_settled"]
    tree = ast.parse("def run(told): ...\nrun(told=1)\nclass Told: ...")
    assert len(list(callbacks(tree))) == 3


if __name__ == "__main__":  # the counts by folder: python tests/project/test_words.py
    for folder in sorted(WORDS):
        print(f'    "{folder}": ({len(WORDS[folder])}, {len(NAMES[folder])}),')
