"""The base class of what people make in Python and in recipes, whose wrong fields are errors of the package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from merging.errors import OptionError, explain_invalid
from merging.maths.parameters import plain

__all__ = ["CheckedModel", "describe_invalid", "named_keys"]

_TYPE = re.compile(r"(constrained|is)-[a-z]+(\[.*\])?|[a-z-]+\[.*\]")
"""Pydantic's name of a type, such as ``constrained-int``, in the keys to a value that could be of several types."""


class CheckedModel(BaseModel):
    """A model of pydantic that raises :class:`~merging.errors.OptionError` where it is made with wrong fields."""

    if not TYPE_CHECKING:  # which sees the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise describe_invalid(error, type(self).__name__) from None

        __init__.__pydantic_base_init__ = True  # as a part of another model it is made without it


def named_keys(keys: Iterable[str | int]) -> tuple[str | int, ...]:
    """Return the keys to a wrong value without those that are pydantic's names of types."""
    return tuple(key for key in keys if not _TYPE.fullmatch(str(key)))


def describe_invalid(error: ValidationError, where: str, before: str = "") -> OptionError:
    """Return the error for the first wrong field of a model, or of a part of it that ``before`` names."""
    first = error.errors()[0]
    field = f"{before}{'.'.join(map(str, named_keys(first['loc'])))}"
    if first["type"] == "missing":
        return OptionError(f"{where}: {field} is missing")
    return OptionError(f"{where}: {field} = {plain(first['input'])!r}: {explain_invalid(first)}")
