"""Pictures by matplotlib, an extra: as SVG for a page, or as files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from merging.errors import OptionError
from merging.report.fonts import make_drawable, use_fonts
from merging.report.page import check_place, write_whole
from merging.report.style import LIGHT, SETTINGS, adapt_svg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "check_drawing", "draw_figure", "draw_panel", "draw_svg", "save"]

_ENDINGS = (".png", ".svg", ".pdf")

_NO_DATES = {
    "png": {"Software": None},
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}
"""Metadata that would differ from one day or version to the next."""

_WIDTH, _LETTERS = 6.4, 14
"""The width of a column of panels in inches, and the letters of a caption in an inch."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: ``draw`` fills its axes, ``size`` is in inches, and ``caption`` says how to read it."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.8, 3.6)


def check_drawing(output: str | Path | None = None, overwrite: bool = True) -> None:
    """Check that drawing is possible, and into this file. Raises :class:`~merging.errors.MergingError`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("plots need matplotlib: pip install 'merging[report]'") from None
    if output is not None:
        if Path(output).suffix not in _ENDINGS:
            raise OptionError(f"{output}: a plot is a .png, .svg or .pdf")
        check_place(Path(output), overwrite)


def draw_svg(panel: Panel) -> str:
    """Return a panel as an SVG drawing on the paper of its page, in the page's light or dark theme.

    Raises :class:`~merging.errors.OptionError` without matplotlib.
    """
    figure = draw_panel(panel)
    with _settings():
        svg = _render(figure, "svg").decode()
    return adapt_svg(svg[svg.index("<svg") :])


def draw_panel(panel: Panel) -> Figure:
    """Return a figure of one panel without title and caption, on no paper."""
    with _settings():
        figure = _new_figure(panel.size)
        panel.draw(figure.subplots())
        use_fonts(figure)
        figure.set_facecolor("none")
    return figure


def draw_figure(panels: Sequence[Panel], title: str) -> Figure:
    """Return one figure of all panels, in two columns, each with its title above and its caption below."""
    with _settings():
        columns = 1 if len(panels) == 1 else 2
        rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
        heights = [min(_WIDTH, max(panel.size[1] for panel in row) + 0.9) for row in rows]
        figure = _new_figure((_WIDTH * columns, sum(heights) + 0.4))
        figure.suptitle(fill(make_drawable(title), int(_WIDTH * columns * 9)), fontweight="bold")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for number, row in enumerate(rows):
            # The last panel of an odd number has the whole row, so that no place is empty.
            places = [grid[number, :]] if len(row) < columns else [grid[number, column] for column in range(columns)]
            for place, panel in zip(places, row, strict=True):
                part = figure.add_subfigure(place)
                part.suptitle(panel.title, fontsize=10)
                caption = fill(panel.caption, int(_WIDTH * _LETTERS * columns / len(row)))
                part.supxlabel(caption, fontsize=8, color=LIGHT.soft)
                panel.draw(part.subplots())
        use_fonts(figure)
    return figure


def save(panels: Sequence[Panel], output: str | Path, title: str, overwrite: bool = True) -> None:
    """Draw all panels into one picture: PNG, SVG or PDF by its suffix. Raises :class:`~merging.errors.MergingError`."""
    check_drawing(output, overwrite)
    figure = draw_figure(panels, title)
    with _settings():
        content = _render(figure, Path(output).suffix[1:])
    write_whole(Path(output), content, overwrite)


@contextmanager
def _settings() -> Iterator[None]:
    check_drawing()
    from matplotlib.style import context

    # A reader's own settings of matplotlib do not change the drawings.
    with context(["default", SETTINGS]):
        yield


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure, ending: str) -> bytes:
    content = io.BytesIO()
    # Cropped to what is drawn: no label is cut off, however long.
    figure.savefig(content, format=ending, dpi=150, metadata=_NO_DATES[ending], bbox_inches="tight", pad_inches=0.08)
    return content.getvalue()
