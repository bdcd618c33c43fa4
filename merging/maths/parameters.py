"""Values of parameters: one for all models or one each, the same everywhere or different by depth and by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from merging.maths.patterns import matches
from merging.maths.site import Site

__all__ = [
    "ByName",
    "Coefficient",
    "Gradient",
    "Local",
    "PerModel",
    "bind_value",
    "graded",
    "patterns",
    "plain",
    "reached",
    "unreached",
    "varies",
]

T = TypeVar("T")

_Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]

# Left to right, so that a tensor is never tried as a number, which would warn of its gradient.
Coefficient = Annotated[Tensor | _Number, Field(union_mode="left_to_right")]
"""A number, or a tensor of one element through which gradients flow."""


class _Varying(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gradient(_Varying):
    """A value that runs through evenly spaced points from the first block to the last, linearly between them.

    Written ``"0.2:0.8"``. Tensors before the blocks have the first value, those behind them the last.
    """

    points: tuple[_Number, ...] = Field(min_length=2)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return {"points": value.split(":")} if isinstance(value, str) else value

    def at(self, site: Site) -> float:
        """The value at a place."""
        position = site.position.depth_with_tail * (len(self.points) - 1)
        index = min(int(position), len(self.points) - 2)
        return self.points[index] + (position - index) * (self.points[index + 1] - self.points[index])

    def plain(self) -> str:
        """As it is written."""
        return ":".join(f"{point:g}" if float(f"{point:g}") == point else repr(point) for point in self.points)


class ByName(_Varying):
    """A value that depends on the tensor: that of the first pattern which :func:`matches` its name.

    Written as a mapping, ``{"mlp": 0.3, "*": "0.2:0.8"}``; a name that no pattern matches is an error.
    """

    rules: tuple[tuple[str, Gradient | _Number], ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return {"rules": tuple(value.items())} if isinstance(value, dict) and "rules" not in value else value

    def at(self, site: Site) -> float:
        """The value at a place. Raises ValueError if no pattern matches its name."""
        for pattern, value in self.rules:
            if matches(pattern, site.name):
                return value.at(site) if isinstance(value, Gradient) else value
        raise ValueError(f'no pattern matches {site.name}: end with "*" for all the others')

    def plain(self) -> dict[str, Any]:
        """As it is written."""
        return {pattern: plain(value) for pattern, value in self.rules}


# A method is asked to merge only once it is bound at a place, when plain values are left: that is what the type
# checker is told of the fields below.
if TYPE_CHECKING:
    Local: TypeAlias = Union[T]  # noqa: UP007 (generic aliases must be subscriptable)
    PerModel: TypeAlias = Union[T, tuple[T, ...]]  # noqa: UP007
else:
    Local: TypeAlias = T | Gradient | ByName
    PerModel: TypeAlias = T | Gradient | ByName | tuple[T | Gradient | ByName, ...]
"""``Local[T]`` is a value that may differ from place to place; ``PerModel[T]`` one for all models or one each, as a
tuple (or a tensor ``[n]`` for coefficients), each of which may differ from place to place."""


def unreached(value: Any, names: Iterable[str]) -> tuple[str, str] | None:
    """A pattern that takes effect nowhere, since others before it take all that it means, and one of these."""
    if isinstance(value, tuple):
        return next((found for each in value if (found := unreached(each, names))), None)
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


def reached(value: Any, site: Site) -> str | None:
    """The pattern by which a value that depends on names is found at a place; None for any other value."""
    rules = value.rules if isinstance(value, ByName) else ()
    return next((pattern for pattern, _ in rules if matches(pattern, site.name)), None)


def varies(value: Any) -> bool:
    """Whether a parameter differs from place to place."""
    return isinstance(value, _Varying) or (isinstance(value, tuple) and any(map(varies, value)))


def graded(value: Any) -> bool:
    """Whether a parameter differs with the depth of the place."""
    if isinstance(value, tuple):
        return any(map(graded, value))
    each = [rule for _, rule in value.rules] if isinstance(value, ByName) else [value]
    return any(isinstance(one, Gradient) for one in each)


def patterns(value: Any) -> list[str]:
    """The patterns by which a parameter tells tensors apart."""
    if isinstance(value, tuple):
        return [pattern for each in value for pattern in patterns(each)]
    return [pattern for pattern, _ in value.rules] if isinstance(value, ByName) else []


def bind_value(value: Any, site: Site) -> Any:
    """What a parameter is at a place. Raises ValueError if it is nothing there."""
    if isinstance(value, tuple):
        return tuple(bind_value(each, site) for each in value)
    return value.at(site) if isinstance(value, (Gradient, ByName)) else value


def plain(value: Any) -> Any:
    """A parameter in values that YAML and JSON know."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value.plain() if isinstance(value, (Gradient, ByName)) else value
