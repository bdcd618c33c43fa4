"""The colors, marks and settings of all pages and pictures, here and in the documentation.

Pages and drawings follow the reader's light or dark scheme on a screen, and are light in print. Readers of any color
vision can distinguish the colors of a list, and each color comes with a marker, a line style or a hatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import cycle
from typing import Any

__all__ = [
    "BAD",
    "DARK",
    "DARK_SCREEN",
    "DOUBTFUL",
    "GOOD",
    "LIGHT",
    "MENDED",
    "SERIES",
    "SETTINGS",
    "Mark",
    "Theme",
    "adapt_svg",
    "series_styles",
]


@dataclass(frozen=True, slots=True)
class Theme:
    """The colors of a light or dark page: paper, text, softer text, rules, tinted rows, links and warnings."""

    paper: str
    ink: str
    soft: str
    line: str
    tint: str
    link: str
    warning: str
    blue: str
    orange: str
    green: str
    purple: str
    red: str

    def css(self) -> str:
        """Return the colors as CSS variables."""
        return " ".join(f"--{each.name}: {getattr(self, each.name)};" for each in fields(self))


LIGHT = Theme(
    *("#ffffff", "#1d2433", "#5b6477", "#dde1ea", "#f5f7fa", "#24549c", "#d9a441"),
    *("#3a66f5", "#d77202", "#029e71", "#7e27a8", "#7d1128"),
)
DARK = Theme(
    *("#15181f", "#e4e7ee", "#a2abbd", "#323846", "#1f242e", "#8db4f2", "#d9a441"),
    *("#7fa9e8", "#e59a14", "#1fe89b", "#c22cff", "#f0404f"),
)

DARK_SCREEN = "@media screen and (prefers-color-scheme: dark)"
"""Where the dark theme holds. Paper is light."""

SERIES = (LIGHT.blue, LIGHT.orange, LIGHT.green, LIGHT.purple, LIGHT.ink)
"""Colors of lines, in their order."""

_MARKERS = "os^DvP*X<>hd"
_DASHES = ("-", "--", "-.", ":")


def series_styles() -> Iterator[dict[str, Any]]:
    """Yield styles of lines without end. The first 12 have markers of their own."""
    for number, marker in enumerate(cycle(_MARKERS)):
        color, dash = SERIES[number % len(SERIES)], _DASHES[number // len(SERIES) % len(_DASHES)]
        yield {"color": color, "marker": marker, "linestyle": dash}


@dataclass(frozen=True, slots=True)
class Mark:
    """How a kind of thing is drawn in every figure: its color, the hatch of its bars, its marker and line style."""

    color: str
    hatch: str
    marker: str
    dash: str


GOOD = Mark(LIGHT.green, "", "o", "-")
MENDED = Mark(LIGHT.blue, "///", "s", "--")
DOUBTFUL = Mark(LIGHT.orange, "---", "^", "-.")
BAD = Mark(LIGHT.red, "xxx", "X", ":")

SETTINGS: dict[str, Any] = {
    # Names of models are not formulas.
    "text.parse_math": False,
    # The same drawing gives the same bytes. Text in SVG is paths: it looks the same with any fonts.
    "svg.hashsalt": "merging",
    "svg.fonttype": "path",
    # Text in PDF can be searched and copied.
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.titlesize": 11,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "hatch.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": LIGHT.paper,
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "grid.color": LIGHT.line,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), LIGHT.ink),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT.soft),
}
"""Settings of matplotlib."""


def adapt_svg(svg: str) -> str:
    """Return matplotlib's SVG so that a dark screen shows it in the dark theme. Other viewers show it as before."""
    rules = "".join(
        f'[style*="{name}: {light}"],[{name}="{light}"]{{{name}:{dark}!important}}'
        for light, dark in zip(astuple(LIGHT), astuple(DARK), strict=True)
        if light != dark and light in svg
        for name in ("fill", "stroke")
    )
    head, end, rest = svg.partition("<defs>")
    return f"{head}<style>{DARK_SCREEN}{{{rules}}}</style>\n{end}{rest}"
