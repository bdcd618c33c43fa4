"""Marks of tests that not every operating system can run."""

from __future__ import annotations

import sys

import pytest

__all__ = ["POSIX"]

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals, forks, pipes or limits of POSIX")
