"""The YAML of a recipe in a text as people leave it: between code fences of a page, with tabs, behind a mark."""

from __future__ import annotations

import re

from merging.errors import FormatError

__all__ = ["extract_yaml", "replace_tabs"]

_FENCE = re.compile(r"(?:```+|~~~+)[ \t]*(\w*)")
_KEY = re.compile(r"^(?:merge_method|slices|models|modules|method|stack|experts)[ \t]*:", re.MULTILINE)
_LANGUAGES = ("", "yaml", "yml")
_PAGES = (".md", ".markdown")


def extract_yaml(text: str, where: str) -> str:
    """Return the YAML of a recipe, from a text that may be a page with the recipe in a block of code.

    All other lines are left empty, so that each line keeps its number.

    Args:
        text: YAML, or a page with exactly one block of YAML that is a recipe. A fence before or behind YAML is no part
            of it.
        where: the name of the text in errors.

    Raises:
        FormatError: for a page without such a block, or with several.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    fences = [index for index, line in enumerate(lines) if _FENCE.match(line)]
    blocks = _find_blocks(lines, fences) if fences else [(0, len(lines))]
    recipes = [block for block in blocks if _KEY.search("\n".join(lines[block[0] : block[1]]))]
    if len(recipes) > 1:
        places = " and ".join(f"line {first}" for first, _ in recipes)
        raise FormatError(f"{where}: has several recipes, at {places}: save your choice as a file of its own")
    if not recipes and (where.lower().endswith(_PAGES) or fences):
        raise FormatError(f"{where}: has no block of YAML with a recipe")
    if not fences or not recipes:
        return text
    first, last = recipes[0]
    return "\n" * first + "\n".join(lines[first:last]) + "\n"


def _find_blocks(lines: list[str], fences: list[int]) -> list[tuple[int, int]]:
    """Return the first line of each block of YAML between fences, and the line behind its last."""
    if len(fences) == 1 and any(_KEY.match(line) for line in lines[: fences[0]]):
        return [(0, fences[0])]  # only the closing fence was copied
    blocks = []
    for opening, closing in zip(fences[::2], [*fences[1::2], len(lines)], strict=False):
        language = _FENCE.match(lines[opening])
        if language and language[1].lower() in _LANGUAGES:
            blocks.append((opening + 1, closing))
    return blocks


def replace_tabs(text: str, where: str) -> str:
    """Return YAML with a space for each tab, which YAML takes only inside of values.

    Raises :class:`~merging.errors.FormatError` for a line that a tab indents, as its depth is not known.
    """
    for number, line in enumerate(text.splitlines(), 1):
        content = line.lstrip()
        if "\t" in line[: len(line) - len(content)] and content and not content.startswith("#"):
            raise FormatError(
                f"{where}, line {number}: is indented by a tab, whose width YAML does not know: use spaces"
            )
    return text.replace("\t", " ")
