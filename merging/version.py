"""The version of the package, which its build reads here too, and the words of versions before it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["__version__", "former_parameters"]

__version__ = "0.1.0"

P = ParamSpec("P")
T = TypeVar("T")


def former_parameters(former: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that accepts keywords of an earlier version.

    Args:
        former: The present name of a parameter, by its former name.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in former.keys() & kwargs.keys():
                if former[name] in kwargs:
                    raise TypeError(f"{former[name]} is given twice: {name} is its former name")
                warning = f"{name}= is called {former[name]}=, and will not be known in a later version"
                warnings.warn(warning, DeprecationWarning, stacklevel=2)
                kwargs[former[name]] = kwargs.pop(name)
            return function(*args, **kwargs)

        return call

    return decorate
