"""All merging methods: one file each, one line each in METHODS, and the chains made of them.

The list is lazy: a method's file, and torch with it, is imported when the method is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from merging.errors import OptionError, nearest

if TYPE_CHECKING:
    from merging.methods.contract.method import Method

__all__ = [
    "ALIASES",
    "GROUPS",
    "MERGEKIT",
    "METHODS",
    "Alias",
    "Listed",
    "aliases",
    "chain",
    "expanded",
    "links",
    "method_class",
    "owner_of",
    "parameters_of",
]


@dataclass(frozen=True, slots=True)
class Listed:
    """A method in the list: one line about it, and where it lives in this package."""

    summary: str
    module: str
    cls: str


GROUPS: dict[str, dict[str, Listed]] = {
    "Sums and means": {
        "linear": Listed("weighted mean of the models", "linear", "Linear"),
        "task_arithmetic": Listed("weighted sum of what each model changed", "task_arithmetic", "TaskArithmetic"),
        "varm": Listed("mean of the changes, weighted by squared size", "varm", "Varm"),
        "passthrough": Listed("one model as it is, or scaled", "passthrough", "Passthrough"),
    },
    "Entry by entry, by sign and size": {
        "ties": Listed("keep large changes, and the ones that agree in sign", "ties", "Ties"),
        "pcb": Listed("weigh parameters by size and agreement with the others", "pcb", "Pcb"),
        "sce": Listed("mean of what agrees in sign, weighted by squared size", "sce", "Sce"),
        "magmax": Listed("of every parameter the largest change", "magmax", "MagMax"),
        "consensus": Listed("sum of the changes, where several models need it", "consensus", "Consensus"),
        "ram": Listed("mean over the models that changed an entry at all", "ram", "Ram"),
        "ramplus_tl": Listed("ram, with what one model alone changed enlarged", "ram", "RamPlus"),
        "nearswap": Listed("one model's change, clipped to a largest step", "nearswap", "NearSwap"),
        "arcee_fusion": Listed("the second model where it differs most from the first", "arcee_fusion", "ArceeFusion"),
    },
    "On the sphere, by angle": {
        "slerp": Listed("spherical interpolation between two models", "slerp", "Slerp"),
        "nuslerp": Listed("spherical interpolation by weights, whole or by row", "nuslerp", "NuSlerp"),
        "multislerp": Listed("mean direction of all models at their mean length", "multislerp", "MultiSlerp"),
        "karcher": Listed("mean direction along the sphere, at the mean length", "karcher", "Karcher"),
        "model_stock": Listed("from the base to the mean, as far as changes agree", "model_stock", "ModelStock"),
    },
    "Matrix by matrix, by singular values and directions": {
        "tsv": Listed("leading singular vectors of all, made orthogonal", "tsv", "Tsv"),
        "iso_c": Listed("sum of the changes with equal singular values", "iso_c", "IsoC"),
        "iso_cts": Listed("common and task-specific directions of equal size", "iso_cts", "IsoCts"),
        "wudi": Listed("least interference on what each model's change acts on", "wudi", "Wudi"),
        "svd": Listed("sum of the changes without its small singular values", "svd", "Svd"),
        "opcm": Listed("one after the other, projected off the merge so far", "opcm", "Opcm"),
        "do": Listed("magnitudes and directions apart, adapters orthogonalised", "do", "Do"),
    },
    "Around any of these: what it is given, where, or how much": {
        "dare": Listed("drop most of each change at random, rescale the rest", "dare", "Dare"),
        "della": Listed("drop small changes more often than large ones", "della", "Della"),
        "breadcrumbs": Listed("drop the largest and the smallest changes", "breadcrumbs", "Breadcrumbs"),
        "knots": Listed("changes in one common basis of outputs", "knots", "Knots"),
        "core": Listed("changes in common bases of outputs and of inputs", "core", "Core"),
        "decouple": Listed("merge directions inside, and magnitudes by their mean", "decouple", "Decouple"),
        "orthogonalize": Listed("turn adapters' factors away from each other", "orthogonalize", "Orthogonalize"),
        "lines": Listed("scale the merged change by depth", "lines", "Lines"),
    },
}
"""Every method once, under what it is for; wrappers, which go around or before another method, last."""

METHODS: dict[str, Listed] = {name: listed for group in GROUPS.values() for name, listed in group.items()}


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a chain, in which some parameters are fixed and others have another default; and a hint."""

    chain: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    hint: str = ""


_VOTES = {"ties.vote": "weighted", "ties.zero": "plus"}
_SUM = {"ties.normalize": False, **_VOTES}
_DARE = {"dare.drop": 0.0, "dare.rescale": "l1"}

ALIASES: dict[str, Alias] = {
    "dare_linear": Alias("dare+task_arithmetic", {}, _DARE, "mergekit's density is 1 - drop: use drop instead"),
    "dare_ties": Alias(
        "dare+ties", {"ties.density": 1.0}, {**_DARE, **_SUM}, "mergekit's density is 1 - drop: use drop instead"
    ),
    "della_linear": Alias("della+task_arithmetic", {}, {"della.density": 1.0, "della.rescale": "l1"}),
    "breadcrumbs_ties": Alias("breadcrumbs+ties", {"ties.density": 1.0}, {"breadcrumbs.density": 1.0, **_SUM}),
}
"""mergekit's names for chains, with its defaults: nothing is dropped unless a density or drop is given."""

MERGEKIT: dict[str, tuple[str, Mapping[str, Any]]] = {
    "breadcrumbs": ("breadcrumbs+task_arithmetic", {"breadcrumbs.density": 1.0}),
    "della": ("della+ties", {"della.density": 1.0, "della.rescale": "l1", "ties.density": 1.0, **_VOTES}),
    "ram": ("ram", {"epsilon": 1e-5, "relative": False}),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 1e-5, "relative": False}),
    "sce": ("sce", {"density": 1.0, "select": "deltas"}),
    "ties": ("ties", {"density": 1.0, "scope": "tensor", "vote": "weighted", "zero": "plus"}),
}
"""Names that mergekit has too, with other defaults: the chain and the parameters that do the same as its name alone."""


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises :class:`~merging.errors.OptionError` for an unknown name, offering the nearest."""
    listed = METHODS.get(name)
    if listed is None:
        parts = name.lower().replace("-", "_").split("_")
        chained = "+".join("task_arithmetic" if part == "linear" else part for part in parts)
        known = all(part in METHODS for part in chained.split("+"))
        hint = f" (did you mean {chained!r}?)" if known else nearest(name.lower(), [*METHODS, *ALIASES])
        hint = hint or ": the methods are " + ", ".join(METHODS)
        raise OptionError(f"there is no method {name!r}{hint}")
    return cast("type[Method]", getattr(import_module(f"{__name__}.{listed.module}"), listed.cls))


def aliases(text: str) -> list[Alias]:
    """The parts of a chain, each as an alias that may stand for itself."""
    return [ALIASES.get(name.strip(), Alias(name.strip(), {}, {})) for name in text.split("+")]


def expanded(text: str) -> tuple[str, dict[str, Any]]:
    """A chain without aliases, and the parameters that these fix, by ``link.field``."""
    parts = aliases(text)
    return "+".join(part.chain for part in parts), {key: value for part in parts for key, value in part.fixed.items()}


def links(text: str) -> list[type[Method]]:
    """The classes of a chain as it is written (``"lines+task_arithmetic"``): wrappers to the left, the merger last.

    A wrapper that ends a chain wraps task arithmetic. Raises :class:`~merging.errors.OptionError`.
    """
    from merging.methods.contract.wrapper import Wrapper

    classes = [method_class(name.strip()) for name in expanded(text)[0].split("+")]
    if issubclass(classes[-1], Wrapper):
        classes.append(method_class("task_arithmetic"))
    for cls in classes[:-1]:
        if not issubclass(cls, Wrapper):
            raise OptionError(f"{cls.name} is no wrapper, so it can only stand last in the chain {text!r}")
    names = [cls.name for cls in classes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise OptionError(f"{twice} stands twice in the chain {text!r}: once is enough")
    return classes


def parameters_of(cls: type[Method]) -> list[str]:
    """The names of a method's own parameters."""
    return [field for field in cls.model_fields if field != "then"]


def chain(text: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """The method of a chain; parameters go by name, ``"density"``, or ``"ties.density"`` where two links share it.

    Raises :class:`~merging.errors.OptionError` for a parameter that no link has or that several share.
    """
    from merging.methods.contract.method import build

    classes = links(text)
    stated = {key: value for part in aliases(text) for key, value in {**part.fixed, **part.defaults}.items()}
    own = [{key.rpartition(".")[2]: stated[key] for key in stated if key.startswith(f"{cls.name}.")} for cls in classes]
    for key, value in (parameters or {}).items():
        own[owner_of(key, classes, text)][key.rpartition(".")[2]] = value
    method = build(classes[-1], own[-1])
    for cls, values in zip(reversed(classes[:-1]), reversed(own[:-1]), strict=True):
        method = build(cls, {**values, "then": method})
    return method


def owner_of(key: str, classes: list[type[Method]], text: str) -> int:
    """Which link of a chain has a parameter; for none, :class:`~merging.errors.OptionError` tells who has."""
    link, _, field = key.rpartition(".")
    fixed = expanded(text)[1]
    every = [i for i, cls in enumerate(classes) if field in parameters_of(cls) and link in ("", cls.name)]
    owners = [i for i in every if f"{classes[i].name}.{field}" not in fixed]
    if len(owners) == 1:
        return owners[0]
    if every and not owners:
        name = f"{classes[every[0]].name}.{field}"
        hint = next((part.hint for part in aliases(text) if part.hint), f"write {expanded(text)[0]} to choose it")
        raise OptionError(f"{name} is fixed at {fixed[name]:g} in {text!r}: {hint}")
    if owners:
        choices = " or ".join(f"{classes[i].name}.{field}" for i in owners)
        raise OptionError(f"{key!r} is a parameter of several methods in {text!r}: write {choices}")
    if hint := next((part.hint for part in aliases(text) if part.hint), ""):
        raise OptionError(f"{text!r} has no parameter {key!r}: {hint}")
    elsewhere = [name for name in METHODS if field in parameters_of(method_class(name))]
    if elsewhere:
        raise OptionError(
            f"{key!r} is a parameter of {', '.join(elsewhere)}, which the chain {text!r} does not have: leave it out, "
            f"or add the method to the chain"
        )
    known = [field for cls in classes for field in parameters_of(cls)]
    raise OptionError(f"no method of {text!r} has a parameter {key!r}{nearest(field, known)}")
