"""The pins of constraints.txt: one for each requirement of pyproject.toml, within its bounds, on every Python."""

from __future__ import annotations

import sys

import pytest
from packaging.requirements import Requirement
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
