"""A self-contained HTML page: sections of text, facts, tables and figures. It loads nothing from any host.

One function escapes all text, as names of models come from strangers. Figures are SVG drawings in the page, shown as
images, in which no script runs. A content security policy forbids everything outside of the page.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from merging.display.tables import Cell, escape, format_numbers
from merging.errors import OptionError, OutputError, option
from merging.object_stores.store_path import refuse_store_path
from merging.report.style import DARK, DARK_SCREEN, LIGHT
from merging.storage.atomic import existing_parent, make_parents, remove_empty, replace_file

__all__ = ["Page", "check_page", "check_place", "write_whole"]

_STYLE = (
    f"""
:root {{ color-scheme: light dark; {LIGHT.css()} }}
{DARK_SCREEN} {{ :root {{ {DARK.css()} }} }}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Helvetica, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.lead, figcaption, caption, .note { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.2rem 0 0; font-size: .92rem; }
nav a { color: var(--link); text-decoration: none; }
nav a:hover { text-decoration: underline; }
dl { display: grid; grid-template-columns: fit-content(45%) 1fr; gap: .25rem 1.25rem; margin: .9rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow: auto; max-height: 36rem; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; padding: 0 0 .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--tint); max-width: 14rem; overflow-wrap: break-word; position: sticky; top: 0; }
tbody th { font-weight: 500; min-width: 9rem; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
tbody tr:hover { background: var(--tint); }
figure { margin: 1.2rem 0; }
figure .wide { margin: 0; max-height: none; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .4rem; }
figcaption, .note { font-size: .9rem; max-width: 46rem; }
.note { border-left: 3px solid var(--warning); padding-left: .8rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print {
  main { padding: 0; max-width: none; } nav { display: none; } figure, tr { break-inside: avoid; }
  h2, h2 + p, caption { break-after: avoid; } .wide { overflow: visible; max-height: none; }
  table { font-size: .7rem; } th, td { padding: .2rem .3rem; white-space: normal; }
  figure img { width: auto; min-width: 0 !important; max-width: 100% !important; max-height: 23cm; }
}
"""
)

_LEAST, _MOST = 0.8, 1.25
"""How far a drawing may shrink and grow with the screen."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Page:
    """A page that is built piece by piece. Every method adds a piece at the end and returns the page.

    ``Page("A title").section("Part").text("...").table(["model", "norm"], rows).figure(svg, "a caption")``
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._sections: list[str] = []
        self._parts: list[str] = []

    def section(self, heading: str, text: str = "") -> Page:
        """Begin a section, with a first paragraph."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{escape(heading)}</h2>')
        return self.text(text) if text else self

    def text(self, text: str) -> Page:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")
        return self

    def note(self, text: str) -> Page:
        """Add a paragraph that stands out, such as a warning."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')
        return self

    def facts(self, facts: Mapping[str, Cell]) -> Page:
        """Add names and values, one a line."""
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{_cell_text(value)}</dd>" for name, value in facts.items())
        self._parts.append(f"<dl>{lines}</dl>")
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Page:
        """Add a table whose first column names its rows. Columns of numbers are right-aligned.

        Raises ValueError for a row whose length differs from the header's.
        """
        if any(len(row) != len(header) for row in rows):
            raise ValueError("every row of a table has a cell for each column")
        columns = [[row[column] for row in rows] for column in range(len(header))]
        kinds = ["" if any(isinstance(cell, str) for cell in cells) else ' class="n"' for cells in columns]
        formatted = zip(*(_column(cells) for cells in columns), strict=True)
        head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
        body = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in formatted)
        title = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        return self

    def figure(self, svg: str, caption: str) -> Page:
        """Add an SVG drawing with a caption. On a narrow screen a wide drawing scrolls: its text stays legible."""
        data = base64.b64encode(svg.encode()).decode()
        text = escape(caption)
        self._parts.append(
            f'<figure><div class="wide"><img alt="{text}"{_widths(svg)} src="data:image/svg+xml;base64,{data}"></div>'
            f"<figcaption>{text}</figcaption></figure>"
        )
        return self

    def html(self) -> str:
        """Return the page as text."""
        from merging.version import __version__

        links = "".join(f'<a href="#s{n}">{escape(name)}</a>' for n, name in enumerate(self._sections, 1))
        contents = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n{lead}\n{contents}\n"
            + "\n".join(self._parts)
            + f"\n<footer>Made by merging {escape(__version__)}</footer>\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path, overwrite: bool = True) -> None:
        """Write the page to a file, whole or not at all. Raises :class:`~merging.errors.OutputError`."""
        write_whole(Path(path), self.html().encode("utf-8", "replace"), overwrite)


def _widths(svg: str) -> str:
    """Return the style with the least and the largest width of a drawing, from its width in points."""
    found = re.match(r'<svg[^>]* width="([\d.]+)pt"', svg)
    if not found:
        return ""
    pixels = float(found[1]) * 4 / 3
    return f' style="min-width:{_LEAST * pixels:.0f}px;max-width:{_MOST * pixels:.0f}px"'


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    first, *rest = (f"{kind}>{cell}" for cell, kind in zip(row, kinds, strict=True))
    return f'<th scope="row"{first}</th>' + "".join(f"<td{each}</td>" for each in rest)


def _column(cells: Sequence[Cell]) -> list[str]:
    """Return the cells of a column as text."""
    numbers = format_numbers(cells)
    return [_cell_text(cell) if text is None else text for cell, text in zip(cells, numbers, strict=True)]


def _cell_text(value: Cell) -> str:
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else escape(value)


def check_page(path: str | Path | None, overwrite: bool = True) -> None:
    """Check that a page can be written to a file, if one is given. Raises :class:`~merging.errors.MergingError`."""
    if path is not None:
        if Path(path).suffix not in (".html", ".htm"):
            raise OptionError(f"{path}: a page is a .html or .htm: name another file")
        check_place(Path(path), overwrite)


def check_place(path: Path, overwrite: bool = True) -> None:
    """Check that a file can be written there. Raises :class:`~merging.errors.OutputError`."""
    refuse_store_path(path)
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder")
    if not existing_parent(path).is_dir():
        raise OutputError(f"{path}: cannot be written: {existing_parent(path)} is not a folder")
    if not overwrite and os.path.lexists(path):
        raise OutputError(_exists(path))


def write_whole(path: Path, content: bytes, overwrite: bool = True) -> None:
    """Write a file atomically, and the folders above it that are missing.

    Raises :class:`~merging.errors.OutputError`, without ``overwrite`` also for a file that is there.
    """
    made: list[Path] = []
    try:
        made = make_parents(path)
        replace_file(path, content, overwrite)
    except FileExistsError:
        raise OutputError(_exists(path)) from None
    except OSError as error:
        remove_empty(made)
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _exists(path: Path) -> str:
    return f"{path}: exists already: choose another name, or use {option('overwrite', True)}"
