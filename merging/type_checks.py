"""Checks of arguments against the annotations of public functions: a wrong type is one clear error.

An error of Python from deep inside names no argument, and comes when half of the work is done.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from merging.errors import InputError, OptionError, shorten

__all__ = ["check_fields", "check_types", "describe_value"]

P = ParamSpec("P")
T = TypeVar("T")

_SHOWN = 80
"""The most characters of a value that a message shows."""

_PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path"}
"""The words for plain types."""

_GENERIC = {Sequence: "a list", Iterable: "a list", Mapping: "a mapping", Callable: "a function", tuple: "a list"}
"""The words for types with parameters."""


def check_types(*unchecked: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that refuses arguments of other types than the annotations state, before the function runs.

    Options in ``**options`` are left to the function. Numbers of numpy, and objects with a path, are what they stand
    for. A path must be a name that a file can have.

    Args:
        unchecked: Parameters that the function checks itself, in better words.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        names = [each.name for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]

        stated = function.__annotations__
        checked = [name for name in names if name in stated and name not in unchecked]

        @cache
        def annotation(name: str) -> Any:
            # At the first call that needs it, since torch is imported for some.
            return get_type_hints(SimpleNamespace(__annotations__={name: stated[name]}), function.__globals__)[name]

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            given = dict(zip(names, args, strict=False)) | kwargs
            for name in checked:
                if name in given and not _is_named(given[name], stated[name]):
                    _check(name, given[name], annotation(name))
            return function(*args, **kwargs)

        return call

    return decorate


def _is_named(value: Any, annotation: Any) -> bool:
    """Whether the text of an annotation names a value's type, None or text that is no path: it is not resolved then."""
    members = annotation.split(" | ") if isinstance(annotation, str) else ()
    return (value is None and "None" in members) or (type(value) is str and "str" in members and "Path" not in members)


def check_fields(value: Any) -> None:
    """Raise :class:`~merging.errors.OptionError` for a dataclass whose fields are of other types than it states."""
    for name, annotation in get_type_hints(type(value)).items():
        _check(name, getattr(value, name), annotation)


def _check(name: str, value: Any, annotation: Any) -> None:
    misfit = next(_misfits(name, value, annotation), None)
    if misfit is not None:
        part, wrong, wanted = misfit
        raise OptionError(f"{part} should be {_describe_type(wanted)}, and is {describe_value(wrong)}")
    if Path in _members(annotation) and isinstance(value, (str, os.PathLike)):
        _check_path(os.fspath(value))


def _check_path(path: str | bytes) -> None:
    """Refuse a path that no file can have. Raises :class:`~merging.errors.InputError`."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise InputError(f"{path!r}: cannot be a path: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{shorten(os.fsdecode(path))}: cannot be a path: {error.strerror}") from None


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _misfits(name: str, value: Any, annotation: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and the type of each part of a value that is of another type."""
    members = _members(annotation)
    outer = [member for member in members if _is_kind(value, member)]
    if not outer:
        yield name, value, annotation
        return
    parts = [list(_inner_misfits(name, value, member)) for member in outer]
    if all(parts):
        yield parts[0][0]


def _is_kind(value: Any, member: Any) -> bool:
    """Return whether a value is of a type, apart from its parts."""
    origin = get_origin(member) or member
    if origin is Any or isinstance(origin, TypeVar):
        return True
    if origin is None or origin is NoneType:
        return value is None
    if origin is Literal:
        return any(type(value) is type(each) for each in get_args(member))
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is Path:
        return isinstance(value, os.PathLike)
    if origin in (Sequence, Iterable):
        return isinstance(value, origin) and not isinstance(value, (str, bytes, Mapping))
    return isinstance(value, origin)


def _inner_misfits(name: str, value: Any, member: Any) -> Iterator[tuple[str, Any, Any]]:
    origin, inner = get_origin(member), get_args(member)
    if origin is Mapping:
        for key, each in value.items():
            yield from _misfits(f"a key of {name}", key, inner[0])
            yield from _misfits(f"{name}[{key!r:.{_SHOWN}}]", each, inner[1])
    elif origin in (Sequence, Iterable) and not isinstance(value, Iterator):
        for position, each in enumerate(value):
            yield from _misfits(f"{name}[{position}]", each, inner[0])


def _describe_type(annotation: Any) -> str:
    """Return the words for a type; None is not named, as it is a default."""
    members = [member for member in _members(annotation) if member not in (None, NoneType)]
    if Path in members:
        members = [member for member in members if member is not str]
    return " or ".join(dict.fromkeys(_describe_member(member) for member in members))


def _describe_member(member: Any) -> str:
    origin = get_origin(member) or member
    if origin is Literal:
        return " or ".join(map(repr, get_args(member)))
    kind = getattr(origin, "__name__", str(origin))
    return _PLAIN.get(origin) or _GENERIC.get(origin) or f"{_article(kind)} {kind}"


def _article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def describe_value(value: object) -> str:
    """Return the words for a value that is of a wrong type: itself if it is short and plain, else its type."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(value, Mapping) and any(isinstance(each, tensor) for each in value.values()):
        return "a state dict"
    if value is None:
        return "None"
    kind = type(value).__name__
    shown = repr(value) if isinstance(value, (str, bytes, int, float, Path)) else ""
    return shown[:_SHOWN] or f"{_article(kind)} {kind}"
