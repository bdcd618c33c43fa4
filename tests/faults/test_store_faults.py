"""Kills and failing disks: a small version of the command tests/faults/continual.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.adapters import QUIRKS
from support.systems import POSIX

pytestmark = [POSIX, *QUIRKS]

FAULTS = Path(__file__).with_name("continual.py")


@pytest.mark.parametrize(("kills", "calls"), [(1, 1), pytest.param(9, 10, marks=pytest.mark.exhaustive)])
def test_kills_and_failing_calls(kills: int, calls: int) -> None:
    """A small version of the command, which has hundreds of them."""
    words = [sys.executable, str(FAULTS), "--kills", str(kills), "--calls", str(calls), "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{kills} kills at random moments .*{3 * calls} failing calls .*stores damaged: 0", done.stdout)
