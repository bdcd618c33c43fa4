"""Types of the values that options and arguments take: sizes, numbers for models, models."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # no generic class in click 8.1

__all__ = ["MODEL", "SIZE", "Size", "Values"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(ParamType):
    """Bytes, as in 500MB, 2GiB or 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
        if not found or found[2] not in _UNITS or float(found[1]) <= 0:
            self.fail(f"{value!r} is no size: write 500MB, 2GB or 2GiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


class Values(ParamType):
    """One number for all models, or a comma list with one a model; each may run from block to block, as 0.2:0.8."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(part if _runs(part) else float(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r} is neither a number nor a comma list of numbers, nor such that run from the first block to "
                f"the last (0.2:0.8)",
                param,
                ctx,
            )
        return numbers if "," in value else numbers[0]


def _runs(text: str) -> bool:
    """Whether the text is numbers with colons between them."""
    return ":" in text and all(math.isfinite(float(part)) for part in text.split(":"))


class Model(ParamType):
    """A model: a folder, a file, or a name on the Hub."""

    name = "model"


SIZE = Size()
MODEL = Model()
