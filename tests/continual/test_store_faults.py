"""Kills and failing disks: a small version of the command tests/faults/continual.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from adapters import QUIRKS

pytestmark = QUIRKS

FAULTS = Path(__file__).parents[1] / "faults" / "continual.py"


def test_kills_and_failing_calls() -> None:
    """A small version of the command, which has hundreds of them."""
    words = [sys.executable, str(FAULTS), "--kills", "9", "--calls", "10", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"9 kills at random moments .*30 failing calls .*stores damaged: 0", done.stdout)
