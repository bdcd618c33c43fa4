"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from merging.errors import OptionError

__all__ = ["parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(value: int | str, name: str = "") -> int:
    """Return a number of bytes that is given as a number, or as a text such as ``500MB``, ``2GiB`` or ``1000000``.

    ``name`` is the parameter, for messages. Raises :class:`~merging.errors.OptionError` for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.upper() if isinstance(value, str) else ""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text)
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        where = f"{name} = " if name else ""
        raise OptionError(f"{where}{value!r} is no size: write 500MB, 2GB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])
