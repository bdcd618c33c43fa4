"""What programs would refuse or silently ignore: for each rule a file that breaks it, and one that does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merging.serving import PROGRAMS, Finding, verify
from merging.serving.contents import FILES
from merging.serving.rules import Rule
from support.adapters import QUIRKS
from support.serving_cases import ALL, OPTIONS, OTHERS, WRONG, laid, stocked

pytestmark = [
    *QUIRKS,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("shelf"))


def said(path: Path, program: str, options: Mapping[str, Any]) -> list[Finding]:
    """The findings of a program, or of the files for any."""
    programs = list(PROGRAMS) if program == "files" else [program]
    verdict = verify(str(path), programs, **{"values": True, "max_lora_rank": 16, **options})
    assert verdict.served == all(each.severity in ("ok", "warns") for each in verdict.findings)
    return [each for each in verdict.findings if each.program == program]


@pytest.mark.parametrize("case", WRONG)
def test_rule(case: str, shelf: Path, tmp_path: Path) -> None:
    kind, edit, expected = WRONG[case]
    options = {key: str(shelf / value) if key == "base" else value for key, value in OPTIONS.get(case, {}).items()}
    sound = laid(shelf, tmp_path / "sound", kind)
    broken = edit(tmp_path / "broken" if kind == "lora" else laid(shelf, tmp_path / "broken", kind))
    for program, (severity, what) in expected.items():
        (found,) = [each for each in said(broken, program, options) if what in each.what]
        assert (found.severity, bool(found.where), bool(found.todo)) == (severity, True, True)
        if (kind, program) not in OTHERS and case not in ALL:
            assert not [each for each in said(sound, program, options) if what in each.what]


def rules() -> dict[str, Rule]:
    """All rules by program, kind and what they say."""
    return {
        f"{program.name}: {kind}: {rule.what}": rule
        for program in (FILES, *PROGRAMS.values())
        for kind, found in program.rules.items()
        for rule in found
    }


def test_every_rule_is_tested() -> None:
    tested = {(program, *what) for _, _, expected in WRONG.values() for program, what in expected.items()}
    missing = [
        name
        for name, rule in rules().items()
        if not any(name.startswith(f"{p}: ") and rule.severity == s and what in rule.what for p, s, what in tested)
    ]
    assert not missing


def test_every_rule_says_what_to_do() -> None:
    assert not [name for name, rule in rules().items() if not rule.todo]


def test_every_rule_says_where_it_was_taken_from() -> None:
    assert not [program.name for program in PROGRAMS.values() if not re.search(r"\d", program.version)]
    assert not [name for name, rule in rules().items() if not rule.source and not name.startswith("files: ")]
