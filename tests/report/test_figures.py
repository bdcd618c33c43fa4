"""Figures by their artists: limits, ticks, labels and colors, of 1 to 300 models. Pixels are not compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from merging.api.report_pictures import panels as merge_panels
from merging.continual.plot import panels as store_panels
from merging.errors import MergingError
from merging.geometry.pictures import panels as comparison_panels
from merging.pool.plot import MARKS
from merging.pool.plot import panels as pool_panels
from merging.recycling.page import panels as recycling_panels
from merging.report.drawing import Panel, draw_figure, draw_panel, draw_svg, save
from merging.report.style import BAD, DARK, DARK_SCREEN, DOUBTFUL, GOOD, LIGHT, MENDED, SERIES, series_styles
from support import figures

COUNTS = [1, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (2, 5, 12, 20, 30)), 300]
SOME = [5, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (1, 2, 12, 20, 30, 300))]


def compared(count: int) -> list[Panel]:
    return list(comparison_panels(figures.comparison(count)).values())


KINDS: dict[str, Any] = {
    "comparison": compared,
    "pool": lambda count: pool_panels(figures.entries(count)),
    "store": lambda count: store_panels(figures.steps([min(8 * step, 64) for step in range(1, count + 1)])),
    "store held in full": lambda count: store_panels(figures.steps([0] * count)),
    "store that becomes full": lambda count: store_panels(figures.steps([8, 16, 24, *[0] * count][:count])),
    "merge": lambda count: merge_panels(figures.merge_report(count)),
    "recycling": lambda count: recycling_panels(figures.report(min(count, 40))),
}


def axes_of(panel: Panel) -> Any:
    """The axes of one panel, drawn; color bars are behind them in the list of the figure."""
    drawn = draw_panel(panel)
    drawn.canvas.draw()
    return drawn.findobj(lambda each: type(each).__name__ == "Axes")


def panel_of(panels: Sequence[Panel], title: str) -> Panel:
    return next(panel for panel in panels if panel.title == title)


def tick_labels(axis: Any) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_whole_and_apart(kind: str, count: int) -> None:
    """In pictures of all panels: no label is cut off or over another one, no panel is empty, axes are labelled."""
    panels = KINDS[kind](count)
    drawn = draw_figure(panels, f"{count} models with a title that is as long as the names of some models are " * 2)
    assert figures.faults(drawn) == []
    plots = [
        axes for axes in drawn.findobj(lambda each: type(each).__name__ == "Axes") if axes.get_label() != "<colorbar>"
    ]
    assert len(plots) == len(panels)
    for axes in plots:
        assert axes.has_data()
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert axes.get_xlabel() or names[0].startswith("organiz")
        assert axes.get_ylabel() or names[0].startswith(("organiz", "baseline"))


@pytest.mark.parametrize("count", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_single_panels_fit(kind: str, count: int) -> None:
    """As pages show them, each with a caption that is a sentence."""
    for panel in KINDS[kind](count):
        assert figures.faults(draw_panel(panel)) == []
        assert panel.caption.endswith(".")
        assert len(panel.caption.split()) > 8


def test_the_faults_would_be_found() -> None:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1])
        axes.set_xticks([0.5, 0.51], ["one label", "another"])
        axes.text(5, 0.5, "outside", in_layout=False)

    found = figures.faults(draw_figure([Panel("a", "b", draw)], "c"))
    assert "over each other: 'one label' and 'another'" in found
    assert "cut off: 'outside'" in found


@pytest.mark.parametrize("count", [2, 30, 300])
@pytest.mark.parametrize(
    ("title", "limits", "chance"),
    [
        ("cosine between changes", (-1, 1), None),
        ("agreement of signs", (0, 1), "chance 0.5"),
        ("overlap of outputs", (0, 1), "chance 0.029"),
        ("overlap of inputs", (0, 1), "chance 0.03"),
    ],
)
def test_heat_maps_have_fixed_scales(title: str, limits: tuple[int, int], chance: str | None, count: int) -> None:
    """Whatever the values are. The cosines here are about 0.1, and pale."""
    drawn, bar = axes_of(panel_of(compared(count), title))
    (image,) = [*drawn.images, *drawn.collections]
    assert image.get_clim() == limits
    labels = tick_labels(bar.yaxis)
    assert (chance in labels) if chance else not any("chance" in label for label in labels)
    assert bar.get_ylabel()
    assert len(drawn.images) == (count > 30)
    if title == "cosine between changes":
        assert min(image.to_rgba(0.1)[:3]) > 0.8


def test_cells_are_read_against_their_color() -> None:
    """Numbers have a contrast of 4.5 to the cell, over the whole scale."""
    from merging.report.charts import Scale, heatmap

    values = [[row / 6 - 1 for row in range(12)] for _ in range(12)]
    drawn, _ = axes_of(Panel("a", "b", lambda axes: heatmap(axes, values, list("abcdefghijkl"), Scale("c", -1, 1))))
    (image,) = drawn.collections
    assert len(drawn.texts) == 144
    for text in drawn.texts[:12]:
        value = float(text.get_text().replace("\N{MINUS SIGN}", "-"))
        assert contrast(linear(text.get_color()), linear_of(image.to_rgba(value)[:3])) >= 4.5


@pytest.mark.parametrize("count", [2, 12, 30, 300])
def test_lines_end_with_the_blocks(count: int) -> None:
    """Tensors outside the blocks are drawn apart: no line leads to them."""
    (drawn,) = axes_of(panel_of(compared(count), "norm by layer"))
    paths = [line for line in drawn.lines if line.get_linestyle() not in ("None", "", ":")]
    longest = max(max(line.get_xdata()) for line in paths if len(line.get_xdata()) > 2)
    assert longest == 11
    labels = tick_labels(drawn.xaxis)
    assert labels[-1] == "other"
    assert all(label.isdigit() for label in labels[:-1])
    if count <= 12:
        assert len(drawn.get_legend().get_texts()) == count
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in paths}
        assert len(looks) == count


@pytest.mark.parametrize("count", [1, 3, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_steps_and_counts_are_whole(count: int) -> None:
    for panel in KINDS["store"](count):
        (drawn,) = axes_of(panel)
        assert all(re.fullmatch(r"\d[\d,]*", label) for label in tick_labels(drawn.xaxis))
        assert drawn.get_xlabel() == "step (models added)"
    for panel in KINDS["pool"](count)[:2]:
        (drawn,) = axes_of(panel)
        assert all(re.fullmatch(r"\d[\d,]*", label) for label in tick_labels(drawn.xaxis))
    (drawn,) = axes_of(panel_of(compared(count), "intruder dimensions"))
    assert all(label.isdigit() for label in tick_labels(drawn.yaxis))


def test_a_full_rank_is_full() -> None:
    (drawn,) = axes_of(panel_of(store_panels(figures.steps([8, 16, 0, 0])), "rank of the store"))
    labels = {tick.label1.get_text(): tick.get_loc() for tick in drawn.yaxis.get_major_ticks()}
    heights = drawn.lines[0].get_ydata()
    assert list(heights[:2]) == [8, 16]
    assert heights[2] == heights[3] == labels["full"] > 16
    (drawn,) = axes_of(panel_of(store_panels(figures.steps([0, 0])), "rank of the store"))
    assert tick_labels(drawn.yaxis) == ["full"]
    (drawn,) = axes_of(panel_of(store_panels(figures.steps([8, 16])), "rank of the store"))
    assert "full" not in tick_labels(drawn.yaxis)


def test_verdicts_are_drawn_alike_in_both_panels() -> None:
    verdicts, _, norms = KINDS["pool"](30)
    (drawn,) = axes_of(verdicts)
    names = [label.get_text() for label in drawn.get_yticklabels()]
    assert names == ["ok", "repaired", "quarantined", "rejected"]
    colors = dict(zip(names, (bar.get_facecolor() for bar in drawn.patches), strict=True))
    assert len({bar.get_hatch() for bar in drawn.patches}) == 4
    (lines,) = axes_of(norms)
    for line in lines.lines:
        assert np.allclose(to_rgba(line.get_color()), colors[line.get_label()])
        assert line.get_marker() == MARKS[line.get_label()].marker


# -- colors ------------------------------------------------------------------------------------------------------------


def to_rgba(color: str) -> Any:
    from matplotlib.colors import to_rgba

    return to_rgba(color)


def linear_of(color: Sequence[float]) -> Any:
    value = np.asarray(color, dtype=float)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear(color: str) -> Any:
    return linear_of(to_rgba(color)[:3])


def contrast(one: Any, other: Any) -> float:
    dark, light = sorted(float(each @ [0.2126, 0.7152, 0.0722]) for each in (one, other))
    return (light + 0.05) / (dark + 0.05)


VISION = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""What readers of a color vision see of linear RGB (Machado, Oliveira and Fernandes 2009)."""


def lab(color: Any) -> Any:
    """CIELAB of linear RGB."""
    space = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(space) @ np.clip(color, 0.001, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colors_are_seen_on_their_paper(theme: Any) -> None:
    """Text has a contrast of 4.5, lines and bars of 3."""
    paper = linear(theme.paper)
    assert min(contrast(linear(each), paper) for each in (theme.ink, theme.soft, theme.link)) >= 4.5
    shapes = (theme.blue, theme.orange, theme.green, theme.purple, theme.red)
    assert min(contrast(linear(each), paper) for each in shapes) >= 3


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colors_are_told_apart(vision: str, theme: Any) -> None:
    """By a difference of at least 20 in CIELAB, within the lines and within the verdicts."""
    names = {getattr(LIGHT, name): name for name in LIGHT.__dataclass_fields__}
    for colors in (SERIES, [mark.color for mark in (GOOD, MENDED, DOUBTFUL, BAD)]):
        seen = [lab(np.array(VISION[vision]) @ linear(getattr(theme, names[color]))) for color in colors]
        assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 20


def test_the_first_lines_have_markers_of_their_own() -> None:
    styles = [style for style, _ in zip(series_styles(), range(12), strict=False)]
    assert len({style["marker"] for style in styles}) == 12
    assert all(one["color"] != other["color"] for one, other in pairwise(styles))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_the_same_picture_has_the_same_bytes(ending: str, tmp_path: Path) -> None:
    """Also under a reader's own settings of matplotlib; text in SVG is paths, and no date is in it."""
    import matplotlib

    panels = compared(2)[:2]
    save(panels, tmp_path / f"one.{ending}", "one")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "none"}):
        save(panels, tmp_path / f"two.{ending}", "one")
    content = (tmp_path / f"one.{ending}").read_bytes()
    assert content == (tmp_path / f"two.{ending}").read_bytes()
    assert not re.search(rb"CreationDate|dc:date|Matplotlib v|<text", content)


def test_drawings_follow_the_scheme_of_the_screen() -> None:
    """Every color of the light theme that a drawing has is replaced on a dark screen; its paper is the page's."""
    svg = draw_svg(compared(5)[1])
    dark = re.search(r"<style>(@media.*?)</style>", svg)
    assert dark and dark[1].startswith(DARK_SCREEN)
    for name in ("ink", "soft", "blue", "orange", "green", "purple"):
        assert getattr(LIGHT, name) in svg
        assert getattr(DARK, name) in dark[1]
    assert "<image" not in svg
    assert not re.search(r'id="patch_1".*?fill: #ffffff', svg, re.DOTALL)
    assert svg.count("<style") == 2  # its own, and matplotlib's


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off(kind: str, tmp_path: Path) -> None:
    """The edge of a picture is blank."""
    save(KINDS[kind](5)[-2:], tmp_path / "x.png", "title")
    pixels = image.imread(tmp_path / "x.png")
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()


def test_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergingError, match="a plot is a"):
        save(compared(2), tmp_path / "x.gif", "title")
