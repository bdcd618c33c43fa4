"""Malformed recipes in both schemas: one error each, with the file, the line and the key, before any model is opened.

Each file of tests/recipes/malformed marks the line of its fault by ``# <- KEY | WORDS``: the error states this line,
the key and the words. ``# <- file KEY | WORDS`` is a fault of the whole file, such as a missing key.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.commands import refused
from support.paths import TESTS

FILES = {file.stem: file for file in sorted((TESTS / "recipes" / "malformed").glob("*.yml"))}
_MARK = re.compile(r"# <- (?P<file>file )?(?P<key>.+?) \| (?P<words>.+)")


def test_there_are_enough() -> None:
    assert len([name for name in FILES if name.startswith("peer-")]) >= 60
    assert len([name for name in FILES if name.startswith("ours-")]) >= 25


@pytest.mark.parametrize("name", FILES)
def test_malformed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model exists, so that none can be opened, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    text = FILES[name].read_text()
    (tmp_path / "recipe.yml").write_text(text)
    (number, mark), *others = [
        (number, mark) for number, line in enumerate(text.splitlines(), 1) if (mark := _MARK.search(line))
    ]
    assert not others
    message = refused("run", "recipe.yml", "-o", "merged").removeprefix("Error: ")
    assert message.startswith("recipe.yml: " if mark["file"] else f"recipe.yml, line {number}: "), message
    assert mark["key"] in message
    assert mark["words"] in message
    assert message.count("\n") <= 1
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yml"]
