"""A store over a day: a small version of the command tests/faults/soak.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.adapters import QUIRKS
from support.systems import POSIX

pytestmark = [POSIX, *QUIRKS]

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.exhaustive
def test_a_store_lives_through_hours_of_kills() -> None:
    words = [sys.executable, str(SOAK), "--hours", "4", "--seconds", "8"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 models" in done.stdout and "wrong: 0" in done.stdout
