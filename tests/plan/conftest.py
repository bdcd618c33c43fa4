"""Models that several files of tests merge. None is changed by a test."""

from __future__ import annotations

import pytest

from support.exported import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))
