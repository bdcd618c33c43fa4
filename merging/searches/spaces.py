"""Candidates of a search: chains of methods, with ranges of their parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from typing import Any, Literal

from merging.errors import OptionError
from merging.maths.lazy_torch import torch
from merging.maths.parameters import bind_value
from merging.maths.site import Site
from merging.methods import links, owner_of
from merging.methods.chains import chain
from merging.methods.contract.method import Method
from merging.sources.plain_yaml import FAULTS, load_yaml

__all__ = [
    "BASE",
    "CandidateSpace",
    "MergeCandidate",
    "Point",
    "default_spaces",
    "is_searched",
    "read_space",
    "trivial_candidates",
]

Point = tuple[float, ...]
"""A position in a space, each coordinate from 0 to 1."""

BASE = "base"
"""The candidate that merges nothing."""

_USUAL = {
    "scale": "0.2..2",
    "weights": "0..1",
    "density": "0.1..1",
    "drop": "0.1..0.9",
    "beta": "0.1..1.5",
    "alpha": "0..1",
    "ratio": "0.05..0.5",
    "t": "0..1",
    "lambda": "0..1",
    "threshold": "0.1..0.8",
    "common": "0.2..0.9",
    "energy": "0.5..1",
    "gamma": "0..0.1",
}
"""The range of a parameter that is written as ``?``."""


@dataclass(frozen=True, slots=True)
class MergeCandidate:
    """A merge to try.

    Attributes:
        name: its name in tables and messages.
        chain: the chain of methods; None leaves the base as it is.
        parameters: the parameters of the chain by name.
        models: the positions of the models that it merges.
        space: the text of the space that it is from; empty for a trivial choice.
    """

    name: str
    chain: str | None
    parameters: Mapping[str, Any]
    models: tuple[int, ...]
    space: str = ""

    @property
    def key(self) -> str:
        """A digest of the merge, the same for equal merges of any name."""
        facts = [self.chain, sorted(self.parameters.items()), self.models]
        return sha256(json.dumps(facts, default=str).encode()).hexdigest()[:20]

    def method(self) -> Method:
        """Return the method. Raises :class:`~merging.errors.OptionError` for parameters that it does not take."""
        assert self.chain is not None
        return chain(self.chain, self.parameters)


@dataclass(frozen=True, slots=True)
class Dimension:
    """A value that a search may choose: a number of a range, or one of a few values.

    Attributes:
        parameter: the parameter that it belongs to.
        low: the least number.
        high: the largest number.
        choices: the values in place of a range.
        whole: whether the numbers are whole.
    """

    parameter: str
    low: float = 0.0
    high: float = 1.0
    choices: tuple[Any, ...] = ()
    whole: bool = False

    def value(self, coordinate: float) -> Any:
        """Return the value at a coordinate from 0 to 1, with four digits."""
        if self.choices:
            return self.choices[min(int(coordinate * len(self.choices)), len(self.choices) - 1)]
        number = self.low + coordinate * (self.high - self.low)
        return round(number) if self.whole else float(f"{number:.4g}")

    def coordinate(self, value: Any) -> float:
        """Return the coordinate of a value, at the edge for one out of range."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else 0.5
        if not isinstance(value, (int, float)):
            return 0.5
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True, slots=True)
class CandidateSpace:
    """A chain with fixed parameters, and dimensions for the others.

    Attributes:
        text: the space as it was written.
        chain: the chain.
        fixed: parameters with one value.
        dimensions: the values to choose; several of one parameter are one a model, or points along the depth.
        models: the number of models.
        spread: by parameter, whether several values are one a model or points along the depth.
    """

    text: str
    chain: str
    fixed: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]
    models: int
    spread: Mapping[str, Literal["models", "depth"]] = field(default_factory=dict)

    def candidate(self, point: Point) -> MergeCandidate:
        """Return the candidate at a point."""
        values: dict[str, list[Any]] = {}
        for dimension, coordinate in zip(self.dimensions, point, strict=True):
            values.setdefault(dimension.parameter, []).append(dimension.value(coordinate))
        chosen = {name: self._together(name, each) for name, each in values.items()}
        parameters = {**self.fixed, **chosen}
        shown = ", ".join(f"{name}={_show(value)}" for name, value in parameters.items())
        name = f"{self.chain} ({shown})" if shown else self.chain
        return MergeCandidate(name, self.chain, parameters, tuple(range(self.models)), self.text)

    def _together(self, name: str, values: list[Any]) -> Any:
        spread = self.spread.get(name)
        if spread == "models":
            return values
        return ":".join(f"{value:g}" for value in values) if spread == "depth" else values[0]

    def points(self, count: int, seed: int) -> list[Point]:
        """Return points to begin with: the chain's own defaults, and points spread evenly by a Sobol sequence."""
        if not self.dimensions:
            return [()]
        engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
            len(self.dimensions), scramble=True, seed=seed
        )
        drawn = [tuple(row) for row in engine.draw(max(1, count - 1)).tolist()] if count > 1 else []
        return [self._own_point(), *drawn][:count]

    def _own_point(self) -> Point:
        method = chain(self.chain, self.fixed)
        classes = links(self.chain)
        point = []
        for dimension in self.dimensions:
            owner = method.links()[owner_of(dimension.parameter, classes, self.chain)]
            value = getattr(owner, dimension.parameter.rpartition(".")[2])
            point.append(dimension.coordinate(bind_value(value, Site("", ()))))
        return tuple(point)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_space(text: str | Mapping[str, Any], models: int, groups: int = 1) -> CandidateSpace:
    """Read a chain with ranges.

    Args:
        text: ``CHAIN:NAME=VALUE,NAME=VALUE``, such as ``ties:density=0.1..0.5,scale=0.5..2``, or a mapping with
            ``method`` and ``parameters``. A value is a range ``LOW..HIGH``, choices ``A|B``, ``?`` for the usual range
            of the parameter, or a value as a recipe has it. A range of ``weights`` is one weight a model.
        models: the number of models.
        groups: the number of points along the depth that each range of ``scale`` and ``beta`` has.

    Raises:
        OptionError: for a chain, a parameter or a value that there is not.
    """
    if isinstance(text, str):
        name, _, listed = text.partition(":")
        stated = dict(_split(part, text) for part in listed.split(",") if part.strip())
        shown = text
    else:
        name, stated = str(text.get("method", "")), dict(text.get("parameters") or {})
        shown = f"{name}:{','.join(f'{key}={value}' for key, value in stated.items())}" if stated else name
    classes = links(name)
    fixed: dict[str, Any] = {}
    dimensions: list[Dimension] = []
    spread: dict[str, Literal["models", "depth"]] = {}
    for key, value in stated.items():
        owner = classes[owner_of(key, classes, name)]
        field_name = key.rpartition(".")[2]
        found = _read_dimension(key, value, shown, owner.model_fields[field_name].annotation is int)
        if found is None:
            fixed[key] = value
            continue
        copies = 1
        if field_name == "weights" and not found.choices:
            copies, spread[key] = models, "models"
        elif field_name in ("scale", "beta") and groups > 1 and not found.choices:
            copies, spread[key] = groups, "depth"
        dimensions += [found] * copies
    space = CandidateSpace(shown, name, fixed, tuple(dimensions), models, spread)
    try:
        for corner in (0.001, 1.0):  # weights that are all 0 may have no mean
            space.candidate((corner,) * len(dimensions)).method().check(models)
    except OptionError as error:
        raise OptionError(f"{shown}: {error}") from None
    return space


def is_searched(value: Any) -> bool:
    """Return whether the value of a parameter is a range, choices or ``?``."""
    return isinstance(value, str) and (value == "?" or ".." in value or "|" in value)


def _split(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise OptionError(f"{text}: {part.strip()!r} should be NAME=VALUE, such as scale=0.2..1.5")
    value = value.strip()
    return name.strip(), value if is_searched(value) else _read_value(value, text)


def _read_value(value: str, text: str) -> Any:
    """Return a value as a recipe has it. Raises OptionError for a value that is no YAML."""
    try:
        return load_yaml(value, text)
    except FAULTS:
        raise OptionError(f"{text}: {value} is no value of a parameter, such as 0.5 or true") from None


def _read_dimension(key: str, value: Any, text: str, whole: bool) -> Dimension | None:
    """Return the dimension of a value that is a range or choices, None for any other value."""
    if value == "?":
        field_name = key.rpartition(".")[2]
        if field_name not in _USUAL:
            raise OptionError(
                f"{text}: {field_name} has no usual range: write it as {field_name}=LOW..HIGH, or as choices, "
                f"{field_name}=ONE|OTHER"
            )
        value = _USUAL[field_name]
    if not isinstance(value, str):
        return None
    if "|" in value:
        choices = tuple(_read_value(each, text) for each in value.split("|"))
        return Dimension(key, choices=choices)
    low, dots, high = value.partition("..")
    if not dots:
        return None
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = (0.0, 0.0)
    if not ends[0] < ends[1] or not all(map(isfinite, ends)):
        raise OptionError(f"{text}: {key}={value}: a range is LOW..HIGH, two numbers with the lower one first")
    return Dimension(key, *ends, whole=whole)


def default_spaces(models: int, *, based: bool, adapters: bool) -> list[str]:
    """Return the candidates of a search that is given none: chains that do well on our benchmark of texts.

    Args:
        models: the number of models.
        based: whether the models' changes are known, from a base or as adapters.
        adapters: whether all models are adapters.
    """
    if not based:
        return ["linear:weights=0.1..1", *(["slerp:t=0.1..0.9"] if models == 2 else [])]
    common = ["task_arithmetic:scale=0.1..1", "ties:density=0.1..0.5,scale=0.4..2.2"]
    if adapters:
        return [*common, "tsv:scale=0.3..1.5", "varm:scale=1..3.5"]
    return [*common, "tsv:scale=0.5..2", "iso_c:scale=0.5..3", "decouple+tsv:scale=0.5..2.5"]


def trivial_candidates(names: Sequence[str], *, based: bool) -> list[MergeCandidate]:
    """Return the choices that need no search: the base, each model, their mean, and their sum at 1/N and 0.3."""
    everyone = tuple(range(len(names)))
    found = [MergeCandidate(BASE, None, {}, ())] if based else []
    found += [MergeCandidate(f"{name} alone", "linear", {}, (slot,)) for slot, name in enumerate(names)]
    if len(names) > 1:
        found.append(MergeCandidate("plain average", "linear", {}, everyone))
    if based:
        for scale, shown in ((float(f"{1 / len(names):.4g}"), "1/N"), (0.3, "0.3")):
            found.append(MergeCandidate(f"task arithmetic at {shown}", "task_arithmetic", {"scale": scale}, everyone))
    return found
