"""Methods that packages offer by entry points: found when they are asked for, and refused by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import merging
from merging.cli.main import cli
from merging.errors import OptionError
from merging.methods import chain
from merging.methods.registry import installed_methods, method_class

ROOT = Path(__file__).parents[2]

EXAMPLE = ROOT / "examples" / "method_package"

MODULE = """
from pathlib import Path
import merging
Path(__file__).with_suffix(".imported").touch()

@merging.method("{name}")
def {name}(deltas):
    '''For tests.'''
    return deltas.mean(0)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that Python finds."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    importlib.invalidate_caches()


def offer(site: Path, package: str, name: str, value: str, module: str = "", source: str = "") -> None:
    """Install a package as pip leaves it."""
    facts = site / f"{package}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[merging.methods]\n{name} = {value}\n")
    if module:
        (site / f"{module}.py").write_text(source)


def test_a_package_is_imported_when_its_method_is_asked_for(site: Path) -> None:
    offer(site, "one", "offered-one", "offering_one:offered_one", "offering_one", MODULE.format(name="offered_one"))
    assert chain("linear").name == "linear"
    with pytest.raises(OptionError, match="did you mean 'offered_one'"):
        method_class("offered_onee")
    assert not (site / "offering_one.imported").exists()
    assert chain("offered-one").summary == "For tests"
    assert (site / "offering_one.imported").exists()
    assert "offered_one" in installed_methods()[0]


def test_classes_are_offered_too(site: Path) -> None:
    source = """
from typing import ClassVar
from merging.methods.linear import Linear

class Copied(Linear):
    name: ClassVar[str] = "offered_class"
"""
    offer(site, "two", "offered_class", "offering_class:Copied", "offering_class", source)
    assert chain("offered_class", {"weights": (1, 2)}).coefficients(2) == [1, 2]


def test_broken_packages_are_named(site: Path) -> None:
    offer(site, "gone", "offered_gone", "no_such_module:method")
    offer(site, "nothing", "offered_nothing", "offering_nothing:value", "offering_nothing", "value = 3")
    offer(site, "named", "offered_name", "offering_name:other", "offering_name", MODULE.format(name="other"))
    offer(site, "clash", "ties", "offering_ties:ties")
    offer(site, "first", "offered_twice", "offering_a:method")
    offer(site, "second", "offered_twice", "offering_b:method")
    offer(site, "leaver", "offered_leaver", "offering_leaver:value", "offering_leaver", "raise SystemExit(3)")
    wanted = {
        "offered_leaver": "of the package leaver cannot be loaded: SystemExit: 3",
        "offered_gone": "of the package gone cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
        "offered_nothing": "of the package nothing is not a merging method: offering_nothing:value is 3",
        "offered_name": "by the name 'offered_name', and it is called 'other'",
        "offered_twice": "is offered by the package first and the package second",
    }
    for name, message in wanted.items():
        with pytest.raises(OptionError, match=message):
            method_class(name)
    assert method_class("ties").__module__ == "merging.methods.ties"
    methods, notices = installed_methods()
    assert not methods.keys() & {*wanted, "ties"}
    shown = CliRunner().invoke(cli, ["methods"], catch_exceptions=False)
    assert shown.exit_code == 0
    for message in [*wanted.values(), "the package clash offers a method 'ties', which is the name of a built-in one"]:
        assert any(message in notice for notice in notices), message
        assert message in shown.stderr


def test_example_package(tmp_path: Path) -> None:
    """Ten lines in a package of their own: installed, listed, merged with, and held against the laws."""
    source = EXAMPLE / "trimmed_mean.py"
    copy, target = tmp_path / "copy", tmp_path / "site"
    copy.mkdir()
    for file in (source, EXAMPLE / "pyproject.toml"):
        (copy / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(target), str(copy)], check=True, capture_output=True)
    script = """
import sys, torch, merging
from merging.cli.main import main
from merging.testing import check_method
from safetensors.torch import load_file, save_file
base = {"w": torch.zeros(4)}
paths = [f"{n}.safetensors" for n in range(5)]
for n, path in enumerate(paths):
    save_file({"w": torch.full((4,), float(n**2))}, path)
merging.merge(paths[1:], method="trimmed_mean", base=paths[0], output="python.safetensors", scale=2.0)
check_method("trimmed_mean")
for words in (["--method", "trimmed-mean", *paths[1:], "--base", paths[0], "--trim", "9", "-o", "shell.safetensors"],
              ["methods"], ["methods", "trimmed-mean"], ["--method", "trimmed-mean", "--help"]):
    try:
        sys.argv = ["merge", *words]
        main()
    except SystemExit as end:
        assert not end.code, end.code
print([load_file(f"{name}.safetensors")["w"].tolist() for name in ("python", "shell")])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target), "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([[13.0] * 4, [6.5] * 4])
    assert "From installed packages" in done.stdout
    assert "trimmed_mean" in done.stdout
    assert "Mean of the changes, entry by entry" in done.stdout
    assert "how many of the largest" in done.stdout
    assert len([line for line in source.read_text().partition("@merging")[2].splitlines() if line.strip()]) <= 14


def test_in_this_process(site: Path) -> None:
    offer(site, "three", "offered_three", "offering_three:it", "offering_three", MODULE.format(name="it"))
    with pytest.raises(OptionError, match="it is called 'it'"):
        merging.merge_state_dicts([{"w": torch.ones(2)}], method="offered-three", base={"w": torch.zeros(2)})
