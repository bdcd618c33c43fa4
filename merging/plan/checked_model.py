"""The base class of what people make in Python and in recipes, whose wrong fields are errors of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from merging.errors import OptionError, explain_invalid
from merging.maths.parameters import plain

__all__ = ["CheckedModel", "describe_invalid"]


class CheckedModel(BaseModel):
    """A model of pydantic that raises :class:`~merging.errors.OptionError` where it is made with wrong fields."""

    if not TYPE_CHECKING:  # which sees the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise describe_invalid(error, type(self).__name__) from None

        __init__.__pydantic_base_init__ = True  # as a part of another model it is made without it


def describe_invalid(error: ValidationError, where: str, before: str = "") -> OptionError:
    """Return the error for the first wrong field of a model, or of a part of it that ``before`` names."""
    first = error.errors()[0]
    field = f"{before}{'.'.join(map(str, first['loc']))}"
    if first["type"] == "missing":
        return OptionError(f"{where}: {field} is missing")
    return OptionError(f"{where}: {field} = {plain(first['input'])!r}: {explain_invalid(first)}")
