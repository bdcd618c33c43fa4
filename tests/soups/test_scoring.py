"""Scoring commands that print without end, leave processes behind, or have braces in their words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from merging.errors import InputError
from merging.soups.scoring import make_scorer
from support.systems import POSIX

pytestmark = POSIX


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sh -c 'echo {a} {}'", r"printed '\{a\} .*'$"),
        ("sh -c 'echo 1e400'", "printed '1e400'$"),
        ("sh -c 'echo; echo'", "printed nothing$"),
        (r"sh -c 'printf \\377\\376\\n'", "printed '\ufffd\ufffd'$"),
        ("sh -c 'echo {a} >&2; exit 3'", r"failed with code 3: \{a\}$"),
        ("sh -c 'kill -9 $$'", "failed with code -9$"),
    ],
)
def test_rubbish_is_one_message(tmp_path: Path, command: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scorer(command, 20)(tmp_path)


def test_only_the_end_of_an_output_is_kept(tmp_path: Path) -> None:
    assert make_scorer("sh -c 'yes | head -c 3000000; echo; echo 7'", 20)(tmp_path) == 7


def test_a_command_that_prints_without_end_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"took more than 0\.3 seconds and was stopped"):
        make_scorer("yes", 0.3)(tmp_path)


def test_processes_of_a_command_end_with_it(tmp_path: Path) -> None:
    score = make_scorer(f"sh -c 'sleep 60 & echo $! > {tmp_path}/pid; echo 5'", 50)
    assert score(tmp_path) == 5
    number = int((tmp_path / "pid").read_text())
    for _ in range(500):  # the system may take a moment to remove it
        try:
            state = Path(f"/proc/{number}/stat").read_text().split()[2] if Path("/proc").is_dir() else ""
            os.kill(number, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the process that the command started still runs")
