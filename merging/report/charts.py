"""The kinds of charts: heat maps on fixed scales, lines of a few models or bands of many, and bars of counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.report.fonts import shorten_drawable
from merging.report.style import LIGHT, Mark, series_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BANDS",
    "FEW",
    "LABELLED",
    "Scale",
    "bars",
    "count_along",
    "heatmap",
    "heatmap_size",
    "legend",
    "lines",
    "lines_size",
    "paint",
    "short_labels",
]

FEW = 12
"""The most models with lines of their own, and with numbers in the cells of a heat map."""

BANDS = (
    f"Of more than {FEW} models: the median as a line, the middle 80 per cent and the whole range as bands around it."
)
"""The sentence of a caption on charts of lines."""

LABELLED = 20
"""The most rows of a heat map with names; of more, rows have the numbers of the list of models."""

_SHAPES = 1000
"""The most cells of a heat map that are drawn as shapes."""

_MARKED = 40
"""The most points of a line with markers."""

_BELOW, _LINE = 0.45, 60
"""The place of a legend below its axes in inches, and the letters of its line."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The range of a heat map's colors, which does not depend on the values, and the value that chance gives."""

    label: str
    low: float
    high: float
    colors: str = "RdBu_r"
    chance: float | None = None

    def ticks(self) -> dict[float, str]:
        """Return the ticks of the color bar: ends, quarters, and chance in the place of a tick that is too near."""
        near = 0.07 * (self.high - self.low)
        places = [self.low + (self.high - self.low) * quarter / 4 for quarter in range(5)]
        if self.chance is None:
            return {place: _typeset_sign(f"{place:g}") for place in places}
        kept = {place: _typeset_sign(f"{place:g}") for place in places if abs(place - self.chance) > near}
        return kept | {self.chance: f"chance {self.chance:.2g}"}


def heatmap(axes: Axes, values: Sequence[Sequence[float | None]], names: Sequence[str], scale: Scale) -> None:
    """Draw a square matrix over names on a scale. None is left blank."""
    import numpy as np

    grid = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    image = paint(axes, grid, scale)
    axes.set_aspect("equal")
    if len(names) <= LABELLED:
        short = short_labels(names)
        axes.set_xticks(range(len(names)), short, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), short)
    else:
        step = -(-len(names) // 8 // 5) * 5
        places = [0, *range(step - 1, len(names), step)]
        axes.set_xticks(places, [str(place + 1) for place in places])
        axes.set_yticks(places, [str(place + 1) for place in places])
        axes.set(xlabel="model (number in the list)", ylabel="model (number in the list)")
    if len(names) <= FEW:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "#ffffff" if _luminance(image.to_rgba(value)[:3]) < 0.18 else "#000000"
                axes.text(column, row, _typeset_sign(f"{value:.2f}"), ha="center", va="center", color=color, fontsize=8)


def heatmap_size(names: Sequence[str]) -> tuple[float, float]:
    """Return the size of a heat map in inches: cells that hold a number, the names, and the color bar."""
    if len(names) > LABELLED:
        return 4.8, 3.8
    side = max(1.8, 0.4 * min(len(names), FEW), 0.24 * len(names))
    letters = 0.065 * max(map(len, short_labels(names)))
    return side + letters + 1.8, side + 0.7 * letters + 0.3


def paint(axes: Axes, grid: Any, scale: Scale) -> Any:
    """Draw a table of values (a numpy array) with its color bar, and return the image."""
    rows, columns = grid.shape
    colors: dict[str, Any] = {"cmap": scale.colors, "vmin": scale.low, "vmax": scale.high}
    if rows * columns <= _SHAPES:  # as shapes, sharp at any size
        edges = [place - 0.5 for place in range(columns + 1)], [place - 0.5 for place in range(rows + 1)]
        image: Any = axes.pcolormesh(*edges, grid, edgecolors="face", linewidth=0.3, **colors)
        axes.invert_yaxis()
    else:
        image = axes.imshow(grid, interpolation="none", aspect="auto", **colors)
    bar: Any = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
    bar.solids.set_edgecolor("face")  # without seams in vector output
    bar.outline.set_edgecolor(LIGHT.line)
    bar.set_label(scale.label)
    ticks = scale.ticks()
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    if scale.chance is not None:
        bar.ax.axhline(scale.chance, color="#000000", linewidth=1.5)
    return image


def _typeset_sign(number: str) -> str:
    """Return a number with the sign that axes have, and none for a rounded zero."""
    return number.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def _luminance(color: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB color, as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lines(
    axes: Axes,
    curves: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    *,
    places: Sequence[float] | None = None,
    apart: tuple[str, Sequence[float]] | None = None,
) -> None:
    """Draw one line a name over ``places`` (or 1, 2, ...), or bands if there are many.

    Args:
        axes: The axes.
        curves: The values by name, in the order of ``places``.
        labels: The labels of both axes.
        places: The positions of the values on the horizontal axis.
        apart: A label, and one more value a name, which is drawn apart from the line, to its right.
    """
    longest = max((len(values) for values in curves.values()), default=0)
    where = list(range(1, longest + 1)) if places is None else list(places)
    aside = where[-1] + max(1.0, 0.12 * (where[-1] - where[0])) if apart and where else 0.0
    if len(curves) <= FEW:
        for (name, values), style in zip(curves.items(), series_styles(), strict=False):
            kept = style if longest <= _MARKED else style | {"marker": ""}
            axes.plot(where[: len(values)], values, label=name, **kept)
        for value, style in zip(apart[1] if apart else (), series_styles(), strict=False):
            axes.plot([aside], [value], **style | {"linestyle": ""})
    else:
        _bands(axes, list(curves.values()), where)
        if apart:
            _bands(axes, [[value, value] for value in apart[1]], [aside - 0.3, aside + 0.3], label=False)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    count_along(axes, "x" if places is None or all(float(place).is_integer() for place in places) else "")
    if apart:
        _mark_apart(axes, apart[0], aside, where)
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        legend(axes)


def _bands(axes: Axes, curves: list[Sequence[float]], where: Sequence[float], *, label: bool = True) -> None:
    """Draw the median, the middle 80 per cent and the range. A shorter curve keeps its last value."""
    import numpy as np

    grid = np.array([[*values, *[values[-1]] * (len(where) - len(values))] for values in curves], dtype=float)
    low, tenth, median, ninetieth, high = np.quantile(grid, (0, 0.1, 0.5, 0.9, 1), axis=0)
    names = ("median", "middle 80 %", f"all {len(curves)}") if label else (None, None, None)
    axes.plot(where, median, color=LIGHT.blue, label=names[0])
    axes.fill_between(where, tenth, ninetieth, color=LIGHT.blue, alpha=0.35, linewidth=0, label=names[1])
    axes.fill_between(where, low, high, color=LIGHT.blue, alpha=0.15, linewidth=0, label=names[2])


def _mark_apart(axes: Axes, label: str, aside: float, where: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, last = where[0], where[-1]
    ticks = MaxNLocator(8, integer=True).tick_values(first, last) if last > first else [first]
    kept = [tick for tick in ticks if first <= tick <= last and aside - tick > 0.1 * (last - first)]
    axes.set_xticks([*kept, aside], [*(f"{tick:g}" for tick in kept), label])
    axes.axvline((last + aside) / 2, color=LIGHT.soft, linewidth=0.8, linestyle=":")


def bars(
    axes: Axes, counts: Mapping[str, int], labels: tuple[str, str], marks: Mapping[str, Mark] | None = None
) -> None:
    """Draw one horizontal bar a name, the first on top, with its count at its end."""
    for place, (name, count) in enumerate(counts.items()):
        mark = (marks or {}).get(name)
        style: dict[str, Any] = (
            {"color": LIGHT.blue} if mark is None else {"facecolor": mark.color, "hatch": mark.hatch}
        )
        bar = axes.barh([place], [count], height=0.7, edgecolor="#ffffff", linewidth=0, **style)
        axes.bar_label(bar, [f"{count:,}"], padding=3, fontsize=8)
    axes.set_yticks(range(len(counts)), short_labels(list(counts)))
    axes.invert_yaxis()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_xlim(0, 1.15 * max(1, *counts.values()))
    count_along(axes, "x")


def count_along(axes: Axes, *sides: str) -> None:
    """Let the ticks of these axes ("x", "y") be few whole numbers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for side in filter(None, sides):
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(7, integer=True))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def legend(axes: Axes, most: int = 24) -> None:
    """Put the legend below the axes, where it covers no data, with names of at most this length."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.get_figure(root=True)
    handles, names = axes.get_legend_handles_labels()
    labels = short_labels(names, most)
    below = axes.transAxes + ScaledTranslation(0, -_BELOW, figure.dpi_scale_trans)
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below}
    axes.legend(handles, labels, ncols=_columns(labels), **place)


def lines_size(names: Sequence[str]) -> tuple[float, float]:
    """Return the size in inches of a chart of a line a name, with its legend."""
    labels = short_labels(names) if len(names) <= FEW else ["bands"]
    return 4.8, 3.1 + 0.18 * -(-len(labels) // _columns(labels))


def _columns(labels: Sequence[str]) -> int:
    """Return the number of columns of a legend."""
    return max(1, min(4, _LINE // (4 + max(map(len, labels)))))


def short_labels(names: Sequence[str], most: int = 24) -> list[str]:
    """Return names that fit next to an axis: each name's beginning and end, numbered where these are equal."""
    short = [shorten_drawable(name, most) for name in names]
    often = Counter(short)
    # Matplotlib leaves names that begin with _ out of its legends.
    distinct = [f"{name} ({number})" if often[name] > 1 else name for number, name in enumerate(short, 1)]
    return [f" {name}" if name.startswith("_") else name for name in distinct]
