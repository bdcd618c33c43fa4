"""Merging methods, one file each, and the chains made of them.

To add a method to the project, write its file and add a line to :mod:`merging.methods.catalog`. To add one from
outside, decorate a function by :func:`merging.method`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merging.errors import OptionError, nearest
from merging.methods.catalog import ALIASES, GROUPS, MERGEKIT, METHODS, Alias, Listed
from merging.methods.registry import installed_methods, method_class, method_names

if TYPE_CHECKING:
    from merging.methods.chains import chain
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
    "expand_aliases",
    "installed_methods",
    "links",
    "method_class",
    "method_names",
    "owner_of",
    "parameters_of",
]


def aliases(text: str) -> list[Alias]:
    """Return the parts of a chain as aliases; a plain name is an alias of itself."""
    return [ALIASES.get(name.strip(), Alias(name.strip(), {}, {})) for name in text.split("+")]


def expand_aliases(text: str) -> tuple[str, dict[str, Any]]:
    """Return a chain without aliases, and the parameters that the aliases fix, by ``link.field``."""
    parts = aliases(text)
    return "+".join(part.chain for part in parts), {key: value for part in parts for key, value in part.fixed.items()}


expanded = expand_aliases  # its name in version 0.1


def links(text: str) -> list[type[Method]]:
    """Return the classes of a written chain (``"lines+task_arithmetic"``): wrappers first, the merging method last.

    A wrapper that ends a chain wraps task arithmetic. Raises :class:`~merging.errors.OptionError`.
    """
    from merging.methods.contract.wrapper import Wrapper

    classes = [method_class(name.strip()) for name in expand_aliases(text)[0].split("+")]
    if issubclass(classes[-1], Wrapper):
        classes.append(method_class("task_arithmetic"))
    for cls in classes[:-1]:
        if not issubclass(cls, Wrapper):
            raise OptionError(f"{cls.name} is not a wrapper, so it can only stand last in the chain {text!r}")
    names = [cls.name for cls in classes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise OptionError(f"{twice} stands twice in the chain {text!r}: once is enough")
    return classes


def parameters_of(cls: type[Method]) -> list[str]:
    """Return the names of a method's own parameters."""
    return [field for field in cls.model_fields if field != "then"]


def owner_of(key: str, classes: list[type[Method]], text: str) -> int:
    """Return the index of the link that has a parameter. Raises :class:`~merging.errors.OptionError` if none has it."""
    link, _, field = key.rpartition(".")
    fixed = expand_aliases(text)[1]
    every = [i for i, cls in enumerate(classes) if field in parameters_of(cls) and link in ("", cls.name)]
    owners = [i for i in every if f"{classes[i].name}.{field}" not in fixed]
    if len(owners) == 1:
        return owners[0]
    if every and not owners:
        name = f"{classes[every[0]].name}.{field}"
        hint = next((part.hint for part in aliases(text) if part.hint), f"write {expand_aliases(text)[0]} to choose it")
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


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name != "chain":  # which needs pydantic, unlike the lists
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module("merging.methods.chains").chain
