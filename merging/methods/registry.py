"""Methods by name: the built-in ones, those declared in this process, and those that installed packages offer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from merging.errors import OptionError, nearest
from merging.methods.catalog import ALIASES, METHODS

if TYPE_CHECKING:
    from merging.methods.contract.method import Method

__all__ = ["ENTRY_POINTS", "declare", "installed_methods", "method_class", "method_names"]

ENTRY_POINTS = "merging.methods"
"""The group of entry points by which a package offers methods: ``name = "module:object"``."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")

_declared: dict[str, type[Method]] = {}


def method_class(name: str) -> type[Method]:
    """Return the class of a method. Hyphens in the name of a method from outside count as underscores.

    Entry points are searched, and their packages imported, only for a name that is neither built in nor declared.
    Raises :class:`~merging.errors.OptionError` for an unknown name, offering the nearest, and for a method that cannot
    be loaded.
    """
    listed = METHODS.get(name)
    if listed is not None:
        return listed.load()
    known = name.replace("-", "_")
    if known in _declared:
        return _declared[known]
    offered = [entry for entry in _offers() if _name(entry) == known]
    if offered:
        return _load(offered)
    parts = name.lower().replace("-", "_").split("_")
    chained = "+".join("task_arithmetic" if part == "linear" else part for part in parts)
    is_chain = all(part in METHODS for part in chained.split("+"))
    names = method_names()
    hint = f" (did you mean {chained!r}?)" if is_chain else nearest(name.lower(), [*names, *ALIASES])
    hint = hint or f": the methods are {', '.join(names)}. If a package offers it, install that package"
    raise OptionError(f"there is no method {name!r}{hint}")


def method_names() -> list[str]:
    """Return the names of all methods, the built-in ones first. No package is imported."""
    return list(dict.fromkeys([*METHODS, *_declared, *map(_name, _offers())]))


def declare(cls: type[Method]) -> None:
    """Make a method from outside known by its name; the same method may be declared again, as notebooks do.

    Raises :class:`~merging.errors.OptionError` for a name that is taken, or that is none.
    """
    name = cls.name
    if not _NAME.fullmatch(name):
        raise OptionError(f"{name!r} cannot name a method: use lower-case letters, digits and underscores")
    known = _declared.get(name)
    if name in METHODS or name in ALIASES:
        raise OptionError(f"there is a built-in method {name!r}: choose another name")
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(f"there is a method {name!r} already, from {known.__module__}: choose another name")
    _declared[name] = cls


def installed_methods() -> tuple[dict[str, type[Method]], list[str]]:
    """Return all methods from outside by name, and a notice for each offer of a package that is left out."""
    found, notices = dict(_declared), []
    for name in dict.fromkeys(map(_name, _offers())):
        if name in found:
            continue
        try:
            found[name] = _load([entry for entry in _offers() if _name(entry) == name])
        except OptionError as error:
            notices.append(str(error))
    return found, notices


def _offers() -> Iterator[EntryPoint]:
    yield from entry_points(group=ENTRY_POINTS)


def _name(entry: EntryPoint) -> str:
    return entry.name.replace("-", "_")


def _load(offers: list[EntryPoint]) -> type[Method]:
    """Import the method that packages offer by one name. Raises :class:`~merging.errors.OptionError`."""
    from merging.methods.contract.method import Method

    entry, *others = offers
    name, package = _name(entry), _package(entry)
    if others:
        packages = " and ".join(sorted(map(_package, offers)))
        raise OptionError(f"the method {name!r} is offered by {packages}: uninstall all but one")
    if name in METHODS or name in ALIASES:
        raise OptionError(f"{package} offers a method {name!r}, which is the name of a built-in one: it is left out")
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # whatever a package does when it is imported
        raise OptionError(
            f"the method {name!r} of {package} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    cls = type(loaded) if isinstance(loaded, Method) else loaded
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise OptionError(f"the method {name!r} of {package} is not a merging method: {entry.value} is {loaded!r:.80}")
    if cls.name != name:
        raise OptionError(f"{package} offers {entry.value} by the name {name!r}, and it is called {cls.name!r}")
    required = [field for field, info in cls.model_fields.items() if info.is_required() and field != "then"]
    if required:
        raise OptionError(f"the method {name!r} of {package} has a parameter without a default: {required[0]}")
    declare(cls)
    return cls


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist is not None else entry.value
