"""Text as Markdown: characters that would be marks stand for themselves."""

from __future__ import annotations

import re

__all__ = ["cell", "escape"]

_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)


def escape(text: str) -> str:
    """Return text in which only code between backticks is marked."""
    pieces = _CODE.split(text)
    return "".join(
        each if i % 2 else re.sub(r"([*_\[|])", r"\\\1", each).replace("<", "&lt;") for i, each in enumerate(pieces)
    )


def cell(text: str) -> str:
    """Return text for a cell of a table, in which only code is marked."""
    return escape(text.replace("\n", " "))
