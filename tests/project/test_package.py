"""The wheel: it lives beside a project that has a package called `cli`, and brings its own as `merging.cli`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.exhaustive


OTHER = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "other"
version = "1"
[tool.setuptools]
packages = ["cli"]
"""


def test_installs_beside_another_cli(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "cli").mkdir(parents=True)
    (other / "pyproject.toml").write_text(OTHER)
    (other / "cli" / "__init__.py").write_text("whose = 'the other'\n")
    site = tmp_path / "site"
    # Built from a copy, so that no build folder of an earlier time takes part and none is left behind.
    copy = tmp_path / "merging"
    for part in ("merging", "cli"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, copy / part)
    for project in (copy, other):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(project)]
        subprocess.run(pip, check=True, capture_output=True)
    code = "import cli, merging, merging.cli.main as m; print(cli.whose, merging.__file__, m.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    whose, package, command = done.stdout.replace("the other", "the-other").split()
    assert whose == "the-other"
    assert Path(package).is_relative_to(site)
    assert Path(command) == site / "merging" / "cli" / "main.py"
    command_line = [sys.executable, "-m", "merging", "pool", "--help"]
    assert (
        "overrule" in subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    )
    assert (site / "merging" / "py.typed").is_file()
    (facts,) = site.glob("merging-*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in facts.read_text(encoding="utf-8")
    assert [*site.glob("merging-*.dist-info/**/LICENSE")]
    ours = {path.relative_to(ROOT) for path in (ROOT / "merging").rglob("*.py")}
    assert not [path for path in ours if not (site / path).is_file()]
