"""Names of models in any script in figures: no character is drawn as a box."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import get_data_path
from matplotlib.font_manager import fontManager, get_font

from merging.geometry.pictures import panels as comparison_panels
from merging.recycling.page import panels as recycling_panels
from merging.report import fonts
from merging.report.drawing import Panel, draw_figure, draw_panel, save
from support import figures

SCRIPTS = [
    "模型-7b-指令",
    "한국어 모델",
    "日本語のモデル",
    "نموذج عربي",
    "מודל",
    "हिन्दी",
    "ไทย",
    "модель",
    "🙂",
    "x\u200b\x1b",
]


@pytest.fixture
def another_font(tmp_path: Path) -> Iterator[None]:
    """A font on this machine that has 模 and 型, and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 700))
    pen.lineTo((900, 0))
    pen.closePath()
    builder, names = FontBuilder(1000), [".notdef", "one", "two"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("模"): "one", ord("型"): "two"})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Two Characters", "styleName": "Regular", "psName": "TwoCharacters"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    builder.save(tmp_path / "two.ttf")
    with only_fonts_of_matplotlib():
        fontManager.addfont(tmp_path / "two.ttf")
        yield


@pytest.fixture
def no_other_font() -> Iterator[None]:
    """No fonts but those of matplotlib."""
    with only_fonts_of_matplotlib():
        yield


@contextmanager
def only_fonts_of_matplotlib() -> Iterator[None]:
    before = fontManager.ttflist
    fontManager.ttflist = [font for font in before if str(font.fname).startswith(get_data_path())]
    forget_fonts()
    try:
        yield
    finally:
        fontManager.ttflist = before
        forget_fonts()


def forget_fonts() -> None:
    for cached in (fonts._fonts, fonts._family_of):
        cached.cache_clear()


def boxes(drawn: Any) -> list[str]:
    """The characters of a figure's texts that none of their fonts has."""
    found = []
    for text in figures.drawn_texts(drawn):
        files = fontManager._find_fonts_by_props(text.get_fontproperties())
        held = [font for font in map(get_font, files) if "LastResort" not in str(font.fname)]
        found += [
            each for each in text.get_text() if each != "\n" and not any(f.get_char_index(ord(each)) for f in held)
        ]
    return found


def named(count: int) -> dict[str, list[Panel]]:
    """Every kind of figure, of models with names in many scripts."""
    found, recycled = figures.comparison(count), figures.report(count)
    names = [
        SCRIPTS[number % len(SCRIPTS)] + (str(number) if number >= len(SCRIPTS) else "") for number in range(count)
    ]
    models = tuple(replace(each, name=name) for each, name in zip(found.models, names, strict=True))
    weights = recycled.facts["weights"]
    by_adapter = dict(zip(names, weights["by_adapter"].values(), strict=True))
    facts = {**recycled.facts, "weights": {**weights, "by_adapter": by_adapter, "groups": names}}
    return {
        "comparison": list(comparison_panels(replace(found, models=models)).values()),
        "recycling": recycling_panels(replace(recycled, facts=facts)),
    }


@pytest.mark.parametrize("kind", ["comparison", "recycling"])
def test_names_in_any_script_are_read(kind: str) -> None:
    """No character is a box, and no label is over another one, whatever fonts are here."""
    drawn = draw_figure(named(5)[kind] + named(len(SCRIPTS))[kind], " ".join(SCRIPTS))
    assert boxes(drawn) == []
    assert figures.faults(drawn) == []
    for panel in named(len(SCRIPTS))[kind]:
        assert boxes(draw_panel(panel)) == []


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_other_fonts_of_the_machine_are_used(ending: str, another_font: None, tmp_path: Path) -> None:
    """Without a warning, which would fail the test; a character that no font has is an escape."""
    assert fonts.make_drawable("模型") == "模型"
    assert fonts.make_drawable("模한\x1b") == "模\\ud55c?"
    panel = named(2)["comparison"][0]
    drawn = draw_panel(panel)
    (label,) = {each.get_text() for each in figures.drawn_texts(drawn) if "模" in each.get_text()}
    assert label.startswith("模型-7b-")
    assert boxes(drawn) == []
    save([panel], tmp_path / f"picture.{ending}", "模型")
    if ending == "pdf":
        assert b"TwoCharacters" in (tmp_path / "picture.pdf").read_bytes()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_boxes_would_be_found(no_other_font: None) -> None:
    drawn = draw_panel(Panel("a", "b", lambda axes: axes.set_xlabel("한")))
    assert boxes(drawn) == ["한"]


def test_escapes_are_cut_between_characters(no_other_font: None) -> None:
    short = fonts.shorten_drawable("한" * 9 + "-7b", 24)
    assert short == "\\ud55c…\\ud55c-7b"
    assert fonts.shorten_drawable("a" * 24, 24) == "a" * 24
    assert fonts.shorten_drawable("abcdef" * 5, 24) == "abcdefabcd…bcdefabcdef"
