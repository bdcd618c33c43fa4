"""Kills and failing disks where outputs are written: a small version of the command tests/faults/landing.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.systems import POSIX

pytestmark = POSIX

FAULTS = Path(__file__).with_name("landing.py")


def harmed(*words: str) -> str:
    done = subprocess.run([sys.executable, str(FAULTS), *words], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_failing_calls() -> None:
    """A small version of the command, which has hundreds of them."""
    assert "9 failing calls" in harmed("--calls", "1", "--seed", "2")


@pytest.mark.exhaustive
def test_many_failing_calls() -> None:
    assert "wrong: 0" in harmed("--calls", "25")
