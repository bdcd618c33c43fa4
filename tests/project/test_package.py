"""The wheel and the source distribution: what is in them, and the wheel at work in an empty environment.

MERGING_DIST names a folder that has them, as .ci/run builds them for a release; without it they are built here.
MERGING_UV is a uv that installs faster than pip.
"""

from __future__ import annotations

import email
import email.message
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from merging import __version__
from support.paths import EXAMPLES, ROOT

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


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "MERGING_DIST" in os.environ:
        return Path(os.environ["MERGING_DIST"])
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def source_modules() -> set[str]:
    """Return the modules in the sources, but for the one by which a checkout finds cli/."""
    paths = [path for part in ("merging", "cli") for path in (ROOT / part).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in paths} - {"merging/cli/__init__.py"}


def own_modules() -> set[str]:
    """Return the modules in a wheel, where those of cli/ are in merging/cli/."""
    return {f"merging/{name}" if name.startswith("cli") else name for name in source_modules()}


def test_the_wheel_has_the_modules_and_nothing_else(names: set[str]) -> None:
    facts = f"merging-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(facts)} == own_modules() | {"merging/py.typed"}
    assert f"{facts}/licenses/LICENSE" in names


def test_the_source_distribution_has_what_the_wheel_is_built_from(dist: Path) -> None:
    with tarfile.open(dist / f"merging-{__version__}.tar.gz") as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "merging/py.typed",
        "pyproject.toml",
        "setup.py",
    }
    assert source_modules() | wanted <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "examples", ".ci", ".github"))]


def test_the_metadata_is_true(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        text = file.read(f"merging-{__version__}.dist-info/METADATA").decode()
        entry_points = file.read(f"merging-{__version__}.dist-info/entry_points.txt").decode()
    facts: email.message.Message = email.message_from_string(text)
    assert (facts["Name"], facts["Version"]) == ("merging", __version__)
    assert (facts["License-Expression"], facts["License-File"]) == ("Apache-2.0", "LICENSE")
    assert facts["Author"] == "The merging contributors"
    assert facts["Requires-Python"] == ">=3.10"
    assert facts["Description-Content-Type"] == "text/markdown"
    assert str(facts.get_payload()).startswith("# ")
    assert {"recycle", "report", "dev"} <= set(facts.get_all("Provides-Extra") or [])
    assert "Programming Language :: Python :: 3.10" in (facts.get_all("Classifier") or [])
    assert "merge = merging.cli.main:main" in entry_points


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Next to a project that has a package called `cli`, which stays its own."""
    (tmp_path / "other" / "cli").mkdir(parents=True)
    (tmp_path / "other" / "pyproject.toml").write_text(OTHER)
    (tmp_path / "other" / "cli" / "__init__.py").write_text("owner = 'other'\n")
    subprocess.run([sys.executable, "-m", "venv", "env"], cwd=tmp_path, check=True)
    binaries = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")

    def run(program: str, *arguments: str | Path) -> str:
        command = [binaries / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    wanted = ["-q", "-c", ROOT / "constraints.txt", wheel, tmp_path / "other"]
    if uv := os.environ.get("MERGING_UV"):
        subprocess.run([uv, "pip", "install", "--python", binaries / "python", *wanted], check=True)
    else:
        run("python", "-m", "pip", "install", *wanted)
    run("python", "-m", "pip", "check")
    assert run("merge", "--version").split()[-1] == __version__
    code = "import cli, merging.cli.main as ours; print(cli.owner, ours.__file__)"
    owner, path = run("python", "-c", code).split()
    assert owner == "other"
    assert Path(path).parts[-3:] == ("merging", "cli", "main.py")
    adapters = [EXAMPLES / name / "adapter_model.safetensors" for name in ("bbc", "spam")]
    run("merge", "--method", "lines", "-o", "merged.safetensors", *adapters)
    assert (tmp_path / "merged.safetensors").stat().st_size > 1000
