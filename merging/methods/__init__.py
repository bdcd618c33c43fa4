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
    from merging.method import Method

__all__ = ["METHODS", "Listed", "chain", "links", "method_class", "owner_of", "parameters_of"]


@dataclass(frozen=True, slots=True)
class Listed:
    """A method in the list: one line about it, and where it lives in this package."""

    summary: str
    module: str
    cls: str


METHODS: dict[str, Listed] = {
    "linear": Listed("weighted mean of the models", "linear", "Linear"),
    "task_arithmetic": Listed("weighted sum of what each model changed", "task_arithmetic", "TaskArithmetic"),
    "varm": Listed("mean of the changes, weighted by squared size tensor by tensor", "varm", "Varm"),
    "passthrough": Listed("one model as it is, or scaled", "passthrough", "Passthrough"),
    "ties": Listed("keep large changes, and of these the ones that agree in sign", "ties", "Ties"),
    "pcb": Listed("weigh each parameter by its size and its agreement with the other models", "pcb", "Pcb"),
    "sce": Listed("mean of what agrees in sign, weighted by squared size where the models differ", "sce", "Sce"),
    "magmax": Listed("of every parameter the largest change", "magmax", "MagMax"),
    "consensus": Listed("sum of the changes, where several models need it", "consensus", "Consensus"),
    "ram": Listed("mean over the models that changed an entry at all", "ram", "Ram"),
    "ramplus_tl": Listed("ram, with what one model alone changed enlarged", "ram", "RamPlus"),
    "nearswap": Listed("one model's change, clipped to a largest step", "nearswap", "NearSwap"),
    "arcee_fusion": Listed(
        "the second model's weights where they differ most from the first's", "arcee_fusion", "ArceeFusion"
    ),
    "slerp": Listed("spherical interpolation between two models", "slerp", "Slerp"),
    "nuslerp": Listed("spherical interpolation by weights, whole or row by row", "nuslerp", "NuSlerp"),
    "multislerp": Listed("mean direction of all models at their mean length", "multislerp", "MultiSlerp"),
    "karcher": Listed("mean along the sphere of the models' directions, at their mean length", "karcher", "Karcher"),
    "model_stock": Listed(
        "from the base towards the mean, as far as the changes point the same way", "model_stock", "ModelStock"
    ),
    "tsv": Listed("leading singular vectors of each model, made orthogonal to the others'", "tsv", "Tsv"),
    "iso_c": Listed("sum of the changes with equal singular values", "iso_c", "IsoC"),
    "iso_cts": Listed("common and task-specific directions of equal size", "iso_cts", "IsoCts"),
    "wudi": Listed("least interference on what each model's change acts on", "wudi", "Wudi"),
    "svd": Listed("sum of the changes without its small singular values", "svd", "Svd"),
    "opcm": Listed("one model after the other, projected off the merge so far", "opcm", "Opcm"),
    "do": Listed("magnitudes and directions averaged apart, after orthogonalising the adapters", "do", "Do"),
    "lines": Listed("scale the merged change by depth, around any method", "lines", "Lines"),
    "dare": Listed("drop most of each change at random and rescale the rest, before any method", "dare", "Dare"),
    "della": Listed("drop small changes more often than large ones, before any method", "della", "Della"),
    "breadcrumbs": Listed("drop the largest and the smallest changes, before any method", "breadcrumbs", "Breadcrumbs"),
    "knots": Listed("changes in one common basis of outputs, before any method", "knots", "Knots"),
    "core": Listed("changes in common bases of outputs and inputs, before any method", "core", "Core"),
    "decouple": Listed("merge directions by the method inside and magnitudes by the mean", "decouple", "Decouple"),
    "orthogonalize": Listed(
        "turn adapters' factors away from each other, before any method", "orthogonalize", "Orthogonalize"
    ),
}


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises :class:`~merging.errors.OptionError` for an unknown name, offering the nearest."""
    listed = METHODS.get(name)
    if listed is None:
        parts = name.lower().replace("-", "_").split("_")
        chained = "+".join("task_arithmetic" if part == "linear" else part for part in parts)
        known = all(part in METHODS for part in chained.split("+"))
        hint = f" (did you mean {chained!r}?)" if known else nearest(name.lower(), METHODS)
        hint = hint or ": the methods are " + ", ".join(METHODS)
        raise OptionError(f"there is no method {name!r}{hint}")
    return cast("type[Method]", getattr(import_module(f"{__name__}.{listed.module}"), listed.cls))


def links(text: str) -> list[type[Method]]:
    """The classes of a chain as it is written (``"lines+task_arithmetic"``): wrappers to the left, the merger last.

    A wrapper that ends a chain wraps task arithmetic. Raises :class:`~merging.errors.OptionError`.
    """
    from merging.wrapper import Wrapper

    classes = [method_class(name.strip()) for name in text.split("+")]
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
    from merging.method import build

    classes = links(text)
    own: list[dict[str, Any]] = [{} for _ in classes]
    for key, value in (parameters or {}).items():
        own[owner_of(key, classes, text)][key.rpartition(".")[2]] = value
    method = build(classes[-1], own[-1])
    for cls, values in zip(reversed(classes[:-1]), reversed(own[:-1]), strict=True):
        method = build(cls, {**values, "then": method})
    return method


def owner_of(key: str, classes: list[type[Method]], text: str) -> int:
    """Which link of a chain has a parameter; for none, :class:`~merging.errors.OptionError` tells who has."""
    link, _, field = key.rpartition(".")
    owners = [i for i, cls in enumerate(classes) if field in parameters_of(cls) and link in ("", cls.name)]
    if len(owners) == 1:
        return owners[0]
    if owners:
        choices = " or ".join(f"{classes[i].name}.{field}" for i in owners)
        raise OptionError(f"{key!r} is a parameter of several methods in {text!r}: write {choices}")
    elsewhere = [name for name in METHODS if field in parameters_of(method_class(name))]
    if elsewhere:
        raise OptionError(
            f"{key!r} is a parameter of {', '.join(elsewhere)}, which the chain {text!r} does not have: leave it out, "
            f"or add the method to the chain"
        )
    known = [field for cls in classes for field in parameters_of(cls)]
    raise OptionError(f"no method of {text!r} has a parameter {key!r}{nearest(field, known)}")
