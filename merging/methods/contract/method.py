"""The contract of merging methods: a frozen value with parameters, statistics and a merge of one tensor.

A method is one file of :mod:`merging.methods` with a class that has a docstring (formula, paper, departures from the
released code, cost, when it loses), a ``name``, a ``summary``, fields for its parameters, and :meth:`Method.merge`. A
line in :mod:`merging.methods.catalog` puts it on the list. The simplest case is ``merging/methods/magmax.py``;
``varm.py`` has a statistic, ``dare.py`` is a wrapper. :func:`merging.testing.check_method` tries the laws.

From outside the project, :func:`merging.method` makes a method of a function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from merging.display.tables import Displayed
from merging.errors import OptionError, either, explain_invalid, nearest, option
from merging.maths.coefficients import spread
from merging.maths.delta import Delta, Stack
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Coefficient, bind_value, graded, varies
from merging.maths.reductions import Reduction
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues

if TYPE_CHECKING:
    from merging.methods.contract.update_rule import UpdateRule

__all__ = [
    "Grain",
    "Method",
    "ResultStatistic",
    "StackFunction",
    "Statistic",
    "Statistics",
    "StatisticsKind",
    "build",
    "stored_changes",
]

Statistics = Mapping[str, Tensor]
"""Values of the statistics known so far, by name."""

StatisticsKind = Literal["inputs", "fisher"]
"""Statistics of examples: Gram matrices of layers' inputs, or the diagonal of the Fisher information."""

StackFunction = Callable[[Stack, Site, Statistics], Tensor | StoredValues]
"""A function of the changes, the site and the statistics before, whose values are reduced."""

Grain = Literal["element", "row", "matrix"]
"""A piece of a tensor: any elements, whole rows (see :attr:`~merging.maths.site.Site.row`), or the whole tensor."""


def stored_changes(stack: Stack, site: Site, statistics: Statistics) -> StoredValues:
    """Return the changes themselves, which need not be decoded."""
    return stack.stored


@dataclass(frozen=True, slots=True, repr=False)
class Statistic(Displayed):
    """A statistic that a merge needs beforehand: ``reduction`` over ``measure(stack, site, statistics) -> [n, ...]``.

    An order statistic of the changes themselves measures :func:`stored_changes`.

    Taken over all tensors that are merged (``per = "model"``) or over one tensor at a time (``per = "tensor"``).
    ``skips_zeros`` says that tensors without any change add nothing to it.
    """

    name: str
    reduction: Reduction
    measure: StackFunction
    per: Literal["model", "tensor"] = "model"
    skips_zeros: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class ResultStatistic(Displayed):
    """A statistic over the *merged* changes: ``reduction`` over ``measure(merged, stack, site) -> [k, ...]``.

    By row blocks, or on whole tensors and their factors where the statistic follows from these (``grain``).
    """

    name: str
    reduction: Reduction
    measure: Callable[[Delta, Stack, Site], Tensor]
    grain: Literal["element", "matrix"] = "element"


class Method(Displayed, BaseModel, ABC):
    """A merging method: a frozen value whose fields are its parameters.

    Each field is declared once, with default, bounds and a line of help; the command line and recipes follow. A method
    sees tensors and places, never files or devices. Its members come in three tiers:

    1. Every method has ``name``, ``summary`` and :meth:`merge`, and declares what differs from the defaults of
       ``paper``, ``models``, :attr:`merge_space`, :meth:`grain_at`, :attr:`factored`, ``decomposed_side``,
       ``workspace``, :meth:`check` and :meth:`idle`.
    2. A method that must know more than the tensor at hand has :meth:`required_statistics`. One whose result is scaled
       in the end has :meth:`factor`, and :meth:`result_statistics` for it. :meth:`metrics` are reported,
       :meth:`multiple` and :meth:`update_rule` are shortcuts for merges that are sums.
    3. A :class:`~merging.methods.contract.wrapper.Wrapper` adds the method inside, ``then``, and ``unwrap``.

    All else (``rescales``, ``takes_factors``, ``varies``, ``at``, ``links``, ``chain``) follows, and is not overridden.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    # ---- 1. every method

    name: ClassVar[str]
    """Its name in chains, in lower case with underscores."""
    summary: ClassVar[str]
    """One line for lists of methods."""
    paper: ClassVar[str] = ""
    """Title, authors, year and number of the paper."""
    metric_meanings: ClassVar[Mapping[str, str]] = {}
    """A short meaning of each number that it reports, by the number's name; see :meth:`metrics`."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models it merges; None is no limit."""
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = None
    """The side by whose Gram matrix it decomposes full matrices, which costs far more than reading them.

    A Gram matrix of the longer side is larger than the matrix. None for a method that decomposes nothing.
    """
    needs_statistics: ClassVar[StatisticsKind | None] = None
    """The statistics of examples that it needs of each model, which the stacks have then."""
    workspace: ClassVar[int] = 3
    """About how many copies of a tile of all models are in memory at once, for the plan."""

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        """Whether it merges changes from a base, or the weights themselves.

        A method of weights that is :attr:`factored` is linear, so that on adapters it acts on their changes.
        """
        return "delta"

    def grain_at(self, site: Site) -> Grain:
        """Return the smallest piece of the tensor at a place on which :meth:`merge` is exact."""
        return "element"

    @property
    def factored(self) -> bool:
        """Whether low-rank changes are merged into a low-rank change, without ever building the matrix."""
        return False

    def merged_rank(self, ranks: Sequence[int]) -> int:
        """Return the rank of a merge of changes of these ranks, where it is :attr:`factored`."""
        return sum(ranks)

    @property
    def needs_base(self) -> bool:
        """Whether it looks at the base's values, which ``Stack.base`` then holds for whole tensors."""
        return False

    @abstractmethod
    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        """Merge one tensor, or one block of it, into its change (or its weight, as :attr:`merge_space` says).

        ``stack`` holds one change for each model, ``site`` says where the block sits, and ``statistics`` has the
        values of :meth:`required_statistics`.
        """

    def check(self, models: int) -> None:
        """Raise :class:`~merging.errors.OptionError` if the parameters do not suit this many models."""
        least, most = self.models
        if models < least or (most is not None and models > most):
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            noun, verb = "model" if wanted == "1" else "models", "was" if models == 1 else "were"
            hint = (
                f": the model it was trained from goes to {option('base')}"
                if most == 1 and self.merge_space == "delta"
                else ""
            )
            raise OptionError(f"{self.name} merges {wanted} {noun}, and {models} {verb} given{hint}")
        for field in type(self).model_fields:
            value = getattr(self, field)
            tensors = [each for each in (value if isinstance(value, tuple) else [value]) if isinstance(each, Tensor)]
            if not all(bool(each.detach().isfinite().all()) for each in tensors):
                raise OptionError(f"{self.name}.{field} holds NaN or infinities, and a parameter is a finite number")
            given = len(value) if isinstance(value, tuple) or (isinstance(value, Tensor) and value.dim()) else None
            if given is not None and given != models:
                several = either(f"{models} separated by commas", f"a list of {models}")
                raise OptionError(
                    f"{field} has {given} values for {models} models: give one value for all, or {several}, in the "
                    f"order of the models"
                )

    def idle(self, site: Site) -> Mapping[str, str]:
        """Return the parameters without effect at a place, each with the reason. Called on the method bound there."""
        return {}

    @property
    def expansion(self) -> Method | None:
        """The chain that it is short for, if it is."""
        return None

    # ---- 2. statistics, and the shortcuts of sums

    def required_statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that :meth:`merge` needs, in the order in which they are gathered."""
        return ()

    def result_statistics(self, models: int) -> tuple[ResultStatistic, ...]:
        """Return the statistics of the merged changes that :meth:`factor` needs."""
        return ()

    def factor(self, site: Site, statistics: Statistics, models: int) -> Coefficient:
        """Return the number by which the merged change of a tensor is multiplied in the end."""
        return 1.0

    def metrics(self, statistics: Statistics, models: int) -> dict[str, float]:
        """Return numbers to report of the whole merge, by name; ``metric_meanings`` has a meaning of each."""
        return {}

    def meanings_of_metrics(self) -> dict[str, str]:
        """Return the meanings of all numbers that the methods of the chain report."""
        links = [each for link in self.links() for each in (link.expansion.links() if link.expansion else [link])]
        return {name: meaning for link in links for name, meaning in link.metric_meanings.items()}

    def coefficients(self, models: int) -> list[Any]:
        """Return the weight of each model: 1 unless the method has weights of its own."""
        return spread(getattr(self, "weights", 1.0), models)

    def multiple(self, models: int) -> float | None:
        """Return c if the merge is always ``c sum_i w_i delta_i``, else None."""
        return None

    def update_rule(self) -> UpdateRule | None:
        """Return how a merge takes in one more model in constant memory; None if it must see all models at once.

        Called on a method whose models all weigh the same and whose parameters are the same everywhere. Raises
        :class:`~merging.errors.OptionError` for parameters with which it cannot be continued.
        """
        return None

    @property
    def by_depth(self) -> bool:
        """Whether the depth of a place matters."""
        return any(graded(getattr(self, field)) for field in type(self).model_fields)

    def decompositions(self, models: int) -> int:
        """Return the number of eigenvalue problems that a full matrix takes, where ``decomposed_side`` names a side."""
        return 1

    # ---- 3. what follows from the above

    @property
    def rescales(self) -> bool:
        """Whether the merged change is multiplied by a :meth:`factor` of its own, so that it must be a change."""
        return type(self).factor is not Method.factor

    @property
    def takes_factors(self) -> bool:
        """Whether low-rank changes reach it whole and as factors, whatever it makes of them."""
        return self.factored

    @property
    def varies(self) -> bool:
        """Whether any parameter differs from place to place."""
        return any(varies(getattr(self, field)) for field in _field_names(type(self)))

    def at(self, site: Site) -> Method:
        """Return the method bound at a place: every parameter has its value there.

        Raises :class:`~merging.errors.OptionError` for a parameter without a value there, or out of bounds.
        """
        if not self.varies:
            return self
        values = {field: getattr(self, field) for field in type(self).model_fields}
        try:
            return build(type(self), {field: bind_value(value, site) for field, value in values.items()})
        except ValueError as error:
            raise OptionError(f"{self.name}: {error}") from None

    def links(self) -> list[Method]:
        """Return the methods of the chain, outermost first."""
        return [self]

    @property
    def chain(self) -> str:
        """The chain as it is written: ``lines+task_arithmetic``."""
        return "+".join(link.name for link in self.links())


@cache
def _field_names(cls: type[Method]) -> tuple[str, ...]:
    """Return the names of a method's parameters, which pydantic is slow to list for each tensor."""
    return tuple(cls.model_fields)


_FORMS = ("is_instance_of", "float_type", "model_type", "model_attributes_type", "tuple_type", "missing")


def _is_about_form(error: Mapping[str, Any]) -> bool:
    """Return whether pydantic's error is about another form than a parameter's value has."""
    return error["type"] in _FORMS or (error["type"] == "extra_forbidden" and len(error["loc"]) > 1)


def build(cls: type[Method], parameters: Mapping[str, Any]) -> Method:
    """Return ``cls(**parameters)``. An error names the method, the parameter and the values that it accepts.

    Raises :class:`~merging.errors.OptionError`.
    """
    try:
        return cls(**parameters)
    except ValidationError as error:
        # of the errors for each form of a value, our own says most, and then the error for numbers
        first = min(error.errors(), key=lambda each: (each["type"] != "value_error", _is_about_form(each)))
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = [name for name in cls.model_fields if name != "then"]
            hint = nearest(field, known) or f"; its parameters are: {', '.join(known) or 'none'}"
            raise OptionError(f"{cls.name} has no parameter {field!r}{hint}") from None
        raise OptionError(f"{cls.name}.{field} = {first['input']!r}: {explain_invalid(first)}") from None
