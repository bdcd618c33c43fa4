"""The contract of a merging method: a frozen value that says what it merges, what it must see first, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from merging.errors import OptionError, nearest
from merging.maths.delta import Delta, Stack
from merging.maths.parameters import (
    Coefficient,
    all_matching,
    bound,
    graded,
    patterns,
    reached,
    spread,
    unreached,
    varies,
)
from merging.maths.reductions import Reduction
from merging.maths.site import Site

if TYPE_CHECKING:
    from merging.methods.contract.update_rule import UpdateRule

__all__ = ["Grain", "Method", "ResultStatistic", "Statistic", "Statistics", "build", "check_places", "idle_parameters"]

Statistics = Mapping[str, Tensor]
"""Values of the statistics known so far, by name."""

Grain = Literal["element", "row", "matrix"]
"""A piece of a tensor: any elements, whole rows (see :attr:`~merging.maths.site.Site.row`), or all of it."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """A statistic that a merge needs beforehand: ``reduction`` over ``measure(stack, site, statistics) -> [n, ...]``.

    Taken over all tensors that are merged (``per = "model"``) or over one tensor at a time (``per = "tensor"``).
    """

    name: str
    reduction: Reduction
    measure: Callable[[Stack, Site, Statistics], Tensor]
    per: Literal["model", "tensor"] = "model"


@dataclass(frozen=True, slots=True)
class ResultStatistic:
    """A statistic over the *merged* changes: ``reduction`` over ``measure(merged, stack, site) -> [k, ...]``.

    By row blocks, or on whole tensors and their factors where the statistic follows from these (``grain``).
    """

    name: str
    reduction: Reduction
    measure: Callable[[Delta, Stack, Site], Tensor]
    grain: Literal["element", "matrix"] = "element"


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
    takes_apart: ClassVar[bool] = False
    """Whether it takes matrices apart into singular vectors, which costs far more than reading them in full."""
    long_side: ClassVar[bool] = False
    """Whether it may take apart the longer side of matrices, whose Gram matrices are then larger than they are."""
    workspace: ClassVar[int] = 3
    """About how many copies of a tile of all models a merge has in memory at once, for the plan."""

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        """Whether it merges changes from a base, or the weights themselves.

        A method of weights that is ``factored`` is linear, so that on adapters it acts on their changes.
        """
        return "delta"

    @property
    def grain(self) -> Grain:
        """The smallest piece of a tensor on which :meth:`merge` is exact."""
        return "element"

    def grain_at(self, site: Site) -> Grain:
        """The same at a place, where less may be enough."""
        return self.grain

    @property
    def factored(self) -> bool:
        """Whether low-rank changes are merged into a low-rank change, without ever building the matrix."""
        return False

    @property
    def rescales(self) -> bool:
        """Whether the merged change is multiplied by a :meth:`factor` of its place, so that it must be a change."""
        return False

    @property
    def takes_factors(self) -> bool:
        """Whether low-rank changes are brought to it whole and as factors, whatever it makes of them."""
        return self.factored

    @property
    def varies(self) -> bool:
        """Whether any parameter differs from place to place."""
        return any(varies(getattr(self, field)) for field in type(self).model_fields)

    @property
    def by_depth(self) -> bool:
        """Whether the depth of a place matters."""
        return any(graded(getattr(self, field)) for field in type(self).model_fields)

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        """The statistics of the merged changes that :meth:`factor` needs."""
        return ()

    def check(self, models: int) -> None:
        """Raise :class:`~merging.errors.OptionError` if the parameters do not suit this many models."""
        least, most = self.models
        if models < least or (most is not None and models > most):
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            noun, verb = "model" if wanted == "1" else "models", "was" if models == 1 else "were"
            hint = ": the one it was trained from goes to --base" if most == 1 and self.merge_space == "delta" else ""
            raise OptionError(f"{self.name} merges {wanted} {noun}, and {models} {verb} given{hint}")
        for field in type(self).model_fields:
            value = getattr(self, field)
            tensors = [each for each in (value if isinstance(value, tuple) else [value]) if isinstance(each, Tensor)]
            if not all(bool(each.detach().isfinite().all()) for each in tensors):
                raise OptionError(f"{self.name}.{field} holds NaN or infinities, and a parameter is a finite number")
            given = len(value) if isinstance(value, tuple) or (isinstance(value, Tensor) and value.dim()) else None
            if given is not None and given != models:
                raise OptionError(
                    f"{field} has {given} values for {models} models: give one value for all, or {models} separated by "
                    f"commas, in the order of the models"
                )

    def at(self, site: Site) -> Method:
        """The method bound at a place: every parameter has the value that it has there.

        Raises :class:`~merging.errors.OptionError` for one that has none there, or one out of bounds.
        """
        if not self.varies:
            return self
        values = {field: getattr(self, field) for field in type(self).model_fields}
        try:
            return build(type(self), {field: bound(value, site) for field, value in values.items()})
        except ValueError as error:
            raise OptionError(f"{self.name}: {error}") from None

    def idle(self, site: Site) -> Mapping[str, str]:
        """The parameters that have no effect at a place, each with the reason; asked of the method bound there."""
        return {}

    def required_statistics(self) -> tuple[Statistic, ...]:
        """The statistics that :meth:`merge` needs, in the order in which they are gathered."""
        return ()

    @abstractmethod
    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        """The merged change (or weight, as :attr:`merge_space` says) of one tensor, or of one block of it."""

    def coefficients(self, models: int) -> list[Any]:
        """The weights that the models enter with, one each: 1 unless the method has weights of its own."""
        return spread(getattr(self, "weights", 1.0), models)

    def multiple(self, models: int) -> float | None:
        """c if the merge is known to be ``c sum_i w_i delta_i`` without looking at it, else None."""
        return None

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        """What the merged change of a tensor is multiplied by at the end."""
        return 1.0

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        """Numbers to report of the whole merge, by name."""
        return {}

    def update_rule(self) -> UpdateRule | None:
        """How a merge by this method takes in one more model in constant memory; None if it must see all at once.

        Asked of a method whose models all weigh the same and whose parameters are the same everywhere. Raises
        :class:`~merging.errors.OptionError` for parameters with which it cannot be continued.
        """
        return None

    @property
    def inside(self) -> Method | None:
        """The chain that it is short for, if it is."""
        return None

    def links(self) -> list[Method]:
        """The chain, outermost first."""
        return [self]

    @property
    def chain(self) -> str:
        """The chain as it is written: ``lines+task_arithmetic``."""
        return "+".join(link.name for link in self.links())


def check_places(method: Method, sites: Iterable[Site], models: int, remedy: str = "") -> None:
    """Check the parameters at every place, where they differ from place to place.

    ``remedy`` is what else can be done where the names tell no depth, and something needs it.
    """
    sites = list(sites)
    if method.by_depth and sites and all(site.position.layer is None for site in sites):
        raise OptionError(
            f"{_by_depth(method)} goes by the depth of each tensor in the model, and none of their names tells it "
            f"({sites[0].name} is one): {remedy}leave it out, or choose a value that is the same everywhere"
        )
    if not any(link.varies for link in method.links()):
        return
    for link in method.links():
        values = [getattr(link, field) for field in type(link).model_fields]
        names = [site.name for site in sites]
        all_matching([pattern for value in values for pattern in patterns(value)], names)
        for field, value in zip(type(link).model_fields, values, strict=True):
            if dead := unreached(value, names):
                raise OptionError(
                    f"{link.name}.{field}: {dead[0]!r} takes effect nowhere, since {dead[1]!r} comes before it and the "
                    f"first that matches counts: put {dead[0]!r} first"
                )
    for site in sites:
        method.at(site).check(models)


def _by_depth(method: Method) -> str:
    """The method or the parameter that goes by depth, the innermost."""
    link = next(link for link in reversed(method.links()) if link.by_depth)
    field = next((field for field in type(link).model_fields if graded(getattr(link, field))), None)
    return f"{link.name}.{field}" if field else link.name


def idle_parameters(method: Method, sites: Iterable[Site]) -> list[str]:
    """A notice for each parameter that was given, or each of its patterns, and has no effect at any of its places."""
    links = method.links()
    given = {
        (index, field): getattr(link, field)
        for index, link in enumerate(links)
        for field in sorted(link.model_fields_set - {"then"})
    }
    if not any(link.varies for link in links):  # then places of one kind are alike
        sites = {site.kind: site for site in sites}.values()
    reasons: dict[tuple[int, str, str | None], set[str]] = {}
    for site in sites if given else ():
        idle = [link.idle(site) for link in method.at(site).links()]
        for (index, field), value in given.items():
            reasons.setdefault((index, field, reached(value, site)), set()).add(idle[index].get(field, ""))
    notices = []
    for (index, field, pattern), found in reasons.items():
        if "" not in found:
            where = f" on {pattern!r}" if pattern else ""
            notices.append(f"{links[index].name}.{field} has no effect{where}: {' and '.join(sorted(found))}")
    return notices


_FORMS = ("is_instance_of", "model_type", "model_attributes_type", "tuple_type", "missing")


def build(cls: type[Method], parameters: Mapping[str, Any]) -> Method:
    """``cls(**parameters)``, whose refusals name the method, the parameter and what it accepts.

    Raises :class:`~merging.errors.OptionError`.
    """
    try:
        return cls(**parameters)
    except ValidationError as error:
        # of the forms that a value may have, the numbers tell best what is wrong with it
        found = error.errors()
        first = next((each for each in found if each["type"] not in _FORMS), found[0])
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = [name for name in cls.model_fields if name != "then"]
            hint = nearest(field, known) or f"; its parameters are: {', '.join(known) or 'none'}"
            raise OptionError(f"{cls.name} has no parameter {field!r}{hint}") from None
        raise OptionError(f"{cls.name}.{field} = {first['input']!r}: {first['msg']}") from None
