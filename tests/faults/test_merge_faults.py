"""Merges that stop anywhere and go on: a small version of the command tests/faults/merges.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.systems import POSIX

pytestmark = POSIX

FAULTS = Path(__file__).with_name("merges.py")


def stopped(*words: str) -> str:
    done = subprocess.run([sys.executable, str(FAULTS), *words], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_merge_that_stops_goes_on() -> None:
    assert "with finished work" in stopped("--only", "statistics", "--stops", "5", "--seed", "3")


@pytest.mark.exhaustive
def test_every_kind_of_merge() -> None:
    assert "wrong: 0" in stopped("--stops", "150")
