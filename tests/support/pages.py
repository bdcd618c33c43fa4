"""The README and the pages of docs/, taken apart into the blocks that their readers copy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from support.paths import ROOT

__all__ = ["PAGES", "ROOT", "Block", "blocks", "merge_lines", "prose", "text_of"]

PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the name of the file that it shows if it has a title, and its lines."""

    language: str
    title: str
    text: str


def text_of(page: str) -> str:
    """Return the Markdown of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    return [Block(*match.groups(default="")) for match in _FENCE.finditer(text_of(page))]


def merge_lines(page: str) -> Iterator[str]:
    """Yield the commands of a page that begin with ``merge``."""
    for block in blocks(page):
        if block.language == "bash":
            yield from (line for line in block.text.splitlines() if line.startswith("merge "))


def prose(page: str) -> str:
    """Return the Markdown of a page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))
