"""The requirements of pyproject.toml: each pinned in constraints.txt on every Python, each lower bound tried."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name

from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = {
    text: Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
    if not text.startswith("merging")
}


@pytest.mark.parametrize("python", ["3.10.13", "3.11.7", "3.12.1", "3.13.0", "3.14.0"])
@pytest.mark.parametrize("needed", NEEDED)
def test_each_requirement_is_pinned_within_its_bounds(needed: str, python: str) -> None:
    name, bounds = canonicalize_name(NEEDED[needed].name), NEEDED[needed].specifier
    place = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    pins = [pin for pin in PINS if pin.name == name and (pin.marker is None or pin.marker.evaluate(place))]
    (pin,) = pins
    (pinned,) = pin.specifier
    assert pinned.operator == "=="
    assert bounds.contains(pinned.version)


IN_DEV = [text for text in NEEDED if text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


@pytest.mark.skipif("MERGING_LOWEST" not in os.environ, reason="for .ci/run lowest, which sets MERGING_LOWEST")
@pytest.mark.parametrize("needed", IN_DEV)
def test_the_lowest_version_is_the_one_installed(needed: str) -> None:
    """No other requirement asks for more, so that a bound is what the tests ran with."""
    (bound,) = NEEDED[needed].specifier
    assert Specifier(f"=={bound.version}.*").contains(version(NEEDED[needed].name))
