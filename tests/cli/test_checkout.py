"""A plain checkout, which nobody installed, runs the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources elsewhere, whose files are told from those that are installed by their place."""
    for part in ("merging", "cli"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(checkout: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_is_imported_from_the_checkout(checkout: Path) -> None:
    code = "import merging.cli.main as m, merging.cli.pool.build as b; print(m.__file__, m.__package__, b.__file__)"
    main, package, build = run(checkout, "-c", code).split()
    assert (Path(main), package) == (checkout / "cli" / "main.py", "merging.cli")
    assert Path(build) == checkout / "cli" / "pool" / "build.py"


def test_as_a_module(checkout: Path) -> None:
    assert run(checkout, "-m", "merging", "--version").startswith("merge, version ")
