"""Merges that stop anywhere and go on: small versions of the commands tests/faults/merges.py and network.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.systems import POSIX

pytestmark = POSIX

FAULTS = Path(__file__).parent


def stopped(*words: str, by: str = "merges.py") -> str:
    done = subprocess.run([sys.executable, str(FAULTS / by), *words], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_merge_that_stops_goes_on() -> None:
    assert "with finished work" in stopped("--only", "statistics", "--stops", "5", "--seed", "3")


@pytest.mark.exhaustive
def test_every_kind_of_merge() -> None:
    assert "wrong: 0" in stopped("--stops", "150")


@pytest.mark.exhaustive
def test_a_network_that_is_lost() -> None:
    assert "wrong: 0" in stopped("--stops", "9", by="network.py")
