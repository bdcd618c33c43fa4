"""The advice of ``merge methods --help-me-choose``: on the screen, and as the table of the documentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tables import column_widths, format_rows, list_width

if TYPE_CHECKING:
    from collections.abc import Iterable

    from merging.methods.choosing import Advice

__all__ = ["advice_markdown", "advice_screen"]


def advice_screen(advice: Iterable[Advice], caveat: str) -> str:
    """Return the advice as paragraphs, as wide as the terminal."""
    lines: list[str] = []
    for each in advice:
        facts = [("first", each.first), ("then", each.then), ("here", each.evidence), ("cost", each.cost)]
        indented = [("", label, text.replace("`", "")) for label, text in facts]
        lines += format_rows([(f"You have {each.have}:",)], [list_width()])
        lines += [*format_rows(indented, column_widths(indented, list_width())), ""]
    return "\n".join([*lines, *format_rows([(caveat,)], [list_width()])])


def advice_markdown(advice: Iterable[Advice]) -> str:
    """Return the advice as a table of Markdown, with links to the figures."""
    rows = ["| you have | try first | then | measured here | cost | figures |", "|---|---|---|---|---|---|"]
    for each in advice:
        pages = ", ".join(f"[{page}](../benchmarks/{page}.md)" for page in each.pages)
        rows.append(f"| {each.have} | {each.first} | {each.then} | {each.evidence} | {each.cost} | {pages} |")
    return "\n".join(rows)
