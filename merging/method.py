"""The contract of a merging method: a frozen value that says what it merges, what it must see first, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from merging.delta import Delta, Stack
from merging.errors import OptionError, nearest
from merging.folds import Fold

__all__ = ["Closing", "Coefficient", "Method", "PerModel", "Round", "Seen", "Site", "Wrapper", "number", "spread"]

T = TypeVar("T")

_Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]

# Left to right, so that a tensor is never tried as a number, which would warn of its gradient.
Coefficient = Annotated[Tensor | _Number, Field(union_mode="left_to_right")]
"""A number, or a tensor of one element through which gradients flow."""

PerModel: TypeAlias = Union[T, tuple[T, ...]]  # noqa: UP007 (a generic alias must be subscriptable)
"""One value for all models, or one a model (as a tuple, or as a tensor ``[n]`` for coefficients)."""

Seen = Mapping[str, Tensor]
"""Results of the rounds so far, by name."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tensor sits: its name in the base, its shape, and its layer in the stack of blocks it belongs to.

    ``layer`` is None outside the stacks, where ``after`` tells the tensors behind the blocks (final norm, head) from
    those before. ``start`` is the offset of a block of the tensor, in elements of the flattened whole.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0
    after: bool = False
    start: int = 0

    @property
    def depth(self) -> float:
        """0 in the first block, 1 in the last (and in an only one); 0 outside the stacks."""
        if self.layer is None:
            return 0.0
        return min(1.0, self.layer / (self.layers - 1)) if self.layers > 1 else 1.0

    def block(self, shape: tuple[int, ...], start: int) -> Site:
        """The same place, narrowed to a block of the given shape that starts at a flat offset."""
        return replace(self, shape=shape, start=start)


@dataclass(frozen=True, slots=True)
class Round:
    """A statistic that a merge needs beforehand: ``fold`` over ``of(stack, site, seen) -> [n, ...]``.

    Taken over all tensors that are merged (``per = "model"``) or over one tensor at a time (``per = "tensor"``).
    """

    name: str
    fold: Fold
    of: Callable[[Stack, Site, Seen], Tensor]
    per: Literal["model", "tensor"] = "model"


@dataclass(frozen=True, slots=True)
class Closing:
    """A statistic over the *merged* changes: ``fold`` over ``of(merged, stack, site) -> [k, ...]``, by row blocks."""

    name: str
    fold: Fold
    of: Callable[[Delta, Stack, Site], Tensor]


class Method(BaseModel, ABC):
    """A merging method. Its fields are its parameters, each declared once with default, bounds and a line of help.

    A method is a value: frozen, comparable, printable. It sees tensors and places, never files or devices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models it merges; None is no limit."""

    @property
    def origin(self) -> Literal["base", "none"]:
        """Whether it merges changes from a base, or the weights themselves.

        A method of origin "none" that is ``factored`` is linear, so that on adapters it acts on their changes.
        """
        return "base"

    @property
    def grain(self) -> Literal["element", "matrix"]:
        """The smallest piece of a tensor on which :meth:`merge` is exact."""
        return "element"

    @property
    def factored(self) -> bool:
        """Whether low-rank changes are merged into a low-rank change, without ever building the matrix."""
        return False

    @property
    def rescales(self) -> bool:
        """Whether the merged change is multiplied by a :meth:`factor` of its place, so that it must be a change."""
        return False

    def closing(self, models: int) -> Closing | None:
        """What :meth:`factor` must know about the merged changes, if anything."""
        return None

    def check(self, models: int) -> None:
        """Raise :class:`~merging.errors.OptionError` if the parameters do not suit this many models."""
        least, most = self.models
        if models < least or (most is not None and models > most):
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            raise OptionError(f"{self.name} merges {wanted} models, and {models} were given")
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, Method):
                continue
            given = len(value) if isinstance(value, tuple) or (isinstance(value, Tensor) and value.dim()) else None
            if given is not None and given != models:
                raise OptionError(
                    f"{field} has {given} values for {models} models: give one value for all, or {models} separated by "
                    f"commas, in the order of the models"
                )

    def at(self, site: Site) -> Method:
        """The method bound at a place, for parameters that vary over the model."""
        return self

    def rounds(self) -> tuple[Round, ...]:
        """What must be known before :meth:`merge`, in the order in which it is gathered."""
        return ()

    @abstractmethod
    def merge(self, stack: Stack, site: Site, seen: Seen) -> Delta:
        """The merged change (or weight, for origin "none") of one tensor, or of one block of it."""

    def coefficients(self, models: int) -> list[Any]:
        """The weights that the models enter with, one each: 1 unless the method has weights of its own."""
        return spread(getattr(self, "weights", 1.0), models)

    def multiple(self, models: int) -> float | None:
        """c if the merge is known to be ``c sum_i w_i delta_i`` without looking at it, else None."""
        return None

    def factor(self, site: Site, seen: Seen, models: int) -> Coefficient:
        """What the merged change of a tensor is multiplied by at the end."""
        return 1.0

    def links(self) -> list[Method]:
        """The chain, outermost first."""
        return [self]

    @property
    def chain(self) -> str:
        """The chain as it is written: ``lines+task_arithmetic``."""
        return "+".join(link.name for link in self.links())


class Wrapper(Method):
    """A method around another: what it makes of the changes goes to ``then``, and what comes back it may finish."""

    then: Method = Field(description="the method inside")

    @property
    def origin(self) -> Literal["base", "none"]:
        return self.then.origin

    @property
    def grain(self) -> Literal["element", "matrix"]:
        return self.then.grain

    @property
    def factored(self) -> bool:
        return self.then.factored

    @property
    def rescales(self) -> bool:
        return self.then.rescales

    def closing(self, models: int) -> Closing | None:
        return self.then.closing(models)

    def check(self, models: int) -> None:
        super().check(models)
        self.then.check(models)

    def at(self, site: Site) -> Method:
        return self.model_copy(update={"then": self.then.at(site)})

    def enter(self, stack: Stack, site: Site) -> tuple[Stack, Site, Callable[[Delta], Delta]]:
        """What ``then`` works on, and the way back out of it."""
        return stack, site, lambda merged: merged

    def rounds(self) -> tuple[Round, ...]:
        def inside(of: Callable[[Stack, Site, Seen], Tensor]) -> Callable[[Stack, Site, Seen], Tensor]:
            return lambda stack, site, seen: of(*self.enter(stack, site)[:2], seen)

        return tuple(replace(each, of=inside(each.of)) for each in self.then.rounds())

    def merge(self, stack: Stack, site: Site, seen: Seen) -> Delta:
        stack, site, leave = self.enter(stack, site)
        return leave(self.then.merge(stack, site, seen))

    def coefficients(self, models: int) -> list[Any]:
        return self.then.coefficients(models)

    def factor(self, site: Site, seen: Seen, models: int) -> Coefficient:
        return self.then.factor(site, seen, models)

    def links(self) -> list[Method]:
        return [self, *self.then.links()]


def spread(value: Any, models: int) -> list[Any]:
    """One value a model, from one for all or a sequence of as many; a tensor ``[n]`` is taken apart."""
    if isinstance(value, Tensor) and value.dim():
        return list(value.unbind())
    if isinstance(value, Sequence):
        return list(value)
    return [value] * models


def number(value: float | Tensor) -> float:
    """The value of a coefficient, without its gradient."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def build(cls: type[Method], parameters: Mapping[str, Any]) -> Method:
    """``cls(**parameters)``, whose refusals name the method, the parameter and what it accepts.

    Raises :class:`~merging.errors.OptionError`.
    """
    try:
        return cls(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = [name for name in cls.model_fields if name != "then"]
            hint = nearest(field, known) or f"; its parameters are: {', '.join(known) or 'none'}"
            raise OptionError(f"{cls.name} has no parameter {field!r}{hint}") from None
        raise OptionError(f"{cls.name}.{field} = {first['input']!r}: {first['msg']}") from None
