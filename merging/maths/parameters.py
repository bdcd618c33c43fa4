"""Values of parameters: one for all models or one each, the same everywhere or different by depth and by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, Union

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, model_validator

from merging.maths.block_weights import BY_BLOCK, ByBlock
from merging.maths.lazy_torch import Tensor
from merging.maths.patterns import matches
from merging.maths.site import Site
from merging.maths.varying import Varying

__all__ = [
    "ByName",
    "Coefficient",
    "Gradient",
    "Local",
    "PerModel",
    "bind_value",
    "by_block",
    "find_reached",
    "find_unreached",
    "graded",
    "patterns",
    "plain",
    "varies",
]

T = TypeVar("T")

_Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]

# Left to right, so that a tensor is never tried as a number, which would warn of its gradient.
Coefficient = Annotated[Tensor | _Number, Field(union_mode="left_to_right")]
"""A number, or a tensor of one element through which gradients flow."""


_ELSE = " else "


class Gradient(Varying):
    """A value that runs through evenly spaced points from the first block to the last, linearly between them.

    Written ``"0.2:0.8"``. Tensors before the blocks have the first value, tensors after them the last, unless
    ``outside`` is the value of both: ``"0.2:0.8 else 0.5"``. Points of true and false are steps: each holds until the
    depth of the next one.
    """

    points: tuple[StrictBool | _Number, ...] = Field(min_length=2)
    outside: StrictBool | _Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        points, apart, outside = value.partition(_ELSE)
        parsed: dict[str, Any] = {"points": list(map(_read_switch, points.split(":")))}
        return {**parsed, "outside": _read_switch(outside)} if apart else parsed

    def at(self, site: Site) -> float:
        """Return the value at a site."""
        if self.outside is not None and site.position.layer is None:
            return self.outside
        position = site.position.depth_with_tail * (len(self.points) - 1)
        if all(isinstance(point, bool) for point in self.points):
            return self.points[int(position)]
        index = min(int(position), len(self.points) - 2)
        return self.points[index] + (position - index) * (self.points[index + 1] - self.points[index])

    def plain(self) -> str:
        """Return the text that states it."""
        points = ":".join(map(_write_point, self.points))
        return points if self.outside is None else f"{points}{_ELSE}{_write_point(self.outside)}"


def _read_switch(text: str) -> str | bool:
    """Return true and false as switches, and any other text as it is."""
    return {"true": True, "false": False}.get(text.strip(), text)


def _write_point(point: float) -> str:
    if isinstance(point, bool):
        return str(point).lower()
    return f"{point:g}" if float(f"{point:g}") == point else repr(point)


_Rule: TypeAlias = Gradient | StrictBool | _Number | tuple[Gradient | StrictBool | _Number, ...]


class ByName(Varying):
    """A value that depends on the tensor: the value of the first pattern that :func:`matches` its name.

    Written as a mapping, ``{"mlp": 0.3, "*": "0.2:0.8"}``; a name that no pattern matches is an error. A list in it has
    a value for each model.
    """

    rules: tuple[tuple[str, _Rule], ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, dict) and value and value.keys() <= BY_BLOCK:
            return None  # a value by block
        return {"rules": tuple(value.items())} if isinstance(value, dict) and "rules" not in value else value

    def at(self, site: Site) -> float | tuple[float, ...]:
        """Return the value at a site, or the value of each model. Raises ValueError if no pattern matches its name."""
        for pattern, value in self.rules:
            if matches(pattern, site.name):
                bound: float | tuple[float, ...] = bind_value(value, site)
                return bound
        raise ValueError(f'no pattern matches {site.name}: end with "*" for all the others')

    def plain(self) -> dict[str, Any]:
        """Return the mapping that states it."""
        return {pattern: plain(value) for pattern, value in self.rules}


_LIST = "a list has a value for each model, and here is one for all: from block to block it is written 0.2:0.8"


def _refuse_list(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        raise ValueError(_LIST)
    return value


def _refuse_inner_list(value: ByName) -> ByName:
    for _, rule in value.rules:
        _refuse_list(rule)
    return value


# A method merges only when it is bound at a site, where plain values are left. So the type checker sees these types.
if TYPE_CHECKING:
    Local: TypeAlias = Union[T]  # noqa: UP007 (generic aliases must be subscriptable)
    PerModel: TypeAlias = Union[T, tuple[T, ...]]  # noqa: UP007
else:
    Local: TypeAlias = Annotated[
        T | Gradient | Annotated[ByName, AfterValidator(_refuse_inner_list)] | ByBlock, BeforeValidator(_refuse_list)
    ]
    PerModel: TypeAlias = T | Gradient | ByName | ByBlock | tuple[Local[T], ...]
"""``Local[T]`` is a value that may differ from site to site. ``PerModel[T]`` is one for all models or one each, as a
tuple (or a tensor ``[n]`` for coefficients), and each may differ from site to site."""


def find_unreached(value: Any, names: Iterable[str]) -> tuple[str, str] | None:
    """Return a pattern without effect, since others before it match all its names, and one of these."""
    if isinstance(value, tuple):
        return next((found for each in value if (found := find_unreached(each, names))), None)
    if not isinstance(value, ByName):
        return None
    firsts = {pattern: [name for name in names if matches(pattern, name)] for pattern, _ in value.rules}
    taken: dict[str, str] = {}
    for pattern, meant in firsts.items():
        if meant and all(name in taken for name in meant):
            return pattern, taken[meant[0]]
        for name in meant:
            taken.setdefault(name, pattern)
    return None


def find_reached(value: Any, site: Site) -> str | None:
    """Return the pattern that gives a parameter its value at a site; None for values without patterns."""
    rules = value.rules if isinstance(value, ByName) else ()
    return next((pattern for pattern, _ in rules if matches(pattern, site.name)), None)


def varies(value: Any) -> bool:
    """Return whether a parameter differs from site to site."""
    return isinstance(value, Varying) or (isinstance(value, tuple) and any(map(varies, value)))


def graded(value: Any) -> bool:
    """Return whether a parameter differs with the depth of the site."""
    each = tuple(rule for _, rule in value.rules) if isinstance(value, ByName) else value
    return any(map(graded, each)) if isinstance(each, tuple) else isinstance(each, Gradient)


def patterns(value: Any) -> list[str]:
    """Return the patterns of tensor names in a parameter."""
    if isinstance(value, tuple):
        return [pattern for each in value for pattern in patterns(each)]
    return [pattern for pattern, _ in value.rules] if isinstance(value, ByName) else []


def by_block(value: Any) -> list[ByBlock]:
    """Return the values by block in a parameter."""
    if isinstance(value, tuple):
        return [found for each in value for found in by_block(each)]
    return [value] if isinstance(value, ByBlock) else []


def bind_value(value: Any, site: Site) -> Any:
    """Return the value of a parameter at a site. Raises ValueError where it has none."""
    if isinstance(value, tuple):
        return tuple(bind_value(each, site) for each in value)
    return value.at(site) if isinstance(value, Varying) else value


def plain(value: Any) -> Any:
    """Return a parameter in values that YAML and JSON know."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value.plain() if isinstance(value, Varying) else value
