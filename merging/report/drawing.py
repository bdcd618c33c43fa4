"""Pictures by matplotlib, an extra: as SVG for a page, or as files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import OptionError
from merging.report.page import check_place, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "check_drawing", "draw_svg", "heatmap", "lines", "plain", "save"]

_ENDINGS = (".png", ".svg", ".pdf")
_LABELLED = 20
_WRITTEN = 12
"""The most rows with names, and the most rows of a heat map with numbers in its cells."""

_SETTINGS = {
    # Names of models are not formulas.
    "text.parse_math": False,
    # The same drawing gives the same bytes.
    "svg.hashsalt": "merging",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: ``draw`` fills its axes, ``size`` is in inches, and ``caption`` explains it."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (7.0, 3.4)


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
    """Return a panel as an SVG drawing. Raises :class:`~merging.errors.OptionError` without matplotlib."""
    with _figure(panel.size) as figure:
        panel.draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def save(panels: Sequence[Panel], output: str | Path, title: str, overwrite: bool = True) -> None:
    """Draw all panels into one picture: PNG, SVG or PDF by its suffix. Raises :class:`~merging.errors.MergingError`."""
    check_drawing(output, overwrite)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    content = io.BytesIO()
    with _figure((6.5 * columns, 4.4 * rows)) as figure:
        spots = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spot, panel in zip(spots, panels, strict=False):
            panel.draw(spot)
            spot.set_title(panel.title)
        for spot in spots[len(panels) :]:
            spot.axis("off")
        figure.suptitle(plain(title))
        figure.savefig(content, format=Path(output).suffix[1:], dpi=150)
    write_whole(Path(output), content.getvalue(), overwrite)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    check_drawing()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def heatmap(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    names: Sequence[str],
    limits: tuple[float, float],
    colors: str = "RdBu_r",
) -> None:
    """Draw a square matrix over names, with colors from one limit to the other. None is left blank."""
    import numpy as np

    low, high = limits
    grid = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    image = axes.imshow(grid, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
    if len(names) <= _LABELLED:
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), short)
    else:
        axes.set_xlabel("model")
        axes.set_ylabel("model")
    if len(names) <= _WRITTEN:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                red, green, blue, _ = image.to_rgba(value)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black")


def lines(
    axes: Axes, curves: Mapping[str, Sequence[float]], labels: tuple[str, str], places: Sequence[Any] | None = None
) -> None:
    """Draw one line a name over ``places`` (or 1, 2, ...), with labels for both axes."""
    few = len(curves) <= _LABELLED
    for name, values in curves.items():
        where = range(1, len(values) + 1) if places is None else range(len(values))
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if few else {"linewidth": 0.6, "alpha": 0.5}
        axes.plot(list(where), values, label=_short(name), **style)
    if places is not None:
        step = -(-len(places) // 24)
        axes.set_xticks(range(0, len(places), step), [str(place) for place in places[::step]])
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_ylim(bottom=0)
    if few:
        axes.legend(fontsize=7)


def _short(name: str) -> str:
    """Return a name that fits next to an axis: its beginning and its end."""
    shown = plain(name)
    shown = shown if len(shown) <= 24 else f"{shown[:10]}…{shown[-13:]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves names with _ out of its legends


def plain(text: str) -> str:
    """Return a text with a question mark for each unprintable character."""
    return "".join(each if each.isprintable() else "?" for each in text)
