"""Pages as a browser shows them: plots are there, nothing is asked of any host, text is legible by day and by night."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from merging.api.report_page import page as merge_page
from merging.errors import OutputError
from merging.geometry import compare
from merging.geometry.page import page
from merging.recycling.page import page as recycling_page
from merging.report import Page
from merging.report.charts import LABELLED
from support import figures, tiny
from support.browser import CHROMIUM, Browser, browser

pytestmark = pytest.mark.exhaustive

SECTIONS = ["Models", "Angles", "Sizes", "Signs", "Subspaces", "Intruder dimensions"]
PLOTS = 7
HOSTILE = '<img src="http://elsewhere.invalid/x.png"><script>alert(1)</script>$x^$&amp;'

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison that has everything in it."""
    folder = tmp_path_factory.mktemp("page")
    weights = tiny.model(width=24)
    base = tiny.save(folder / "base", weights)
    tuned = [tiny.save(folder / f"tuned{i}", tiny.fine_tune(weights, i, size=3.0)) for i in range(3)]
    found = compare(tuned, base=base, intruders=True)
    assert all(each.count for each in found.intruders)
    page(found).write(folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def shown(chromium: Browser, comparison: Path) -> Browser:
    chromium.connections.clear()
    chromium.open(comparison.as_uri())
    return chromium


def pixels(png: bytes) -> Any:
    return image.imread(BytesIO(png))


@needs_browser
def test_plots_are_drawn(shown: Browser) -> None:
    """Each has a size of its own, and what the screen shows in its place is a drawing: many colours, some of them."""
    told = """Array.from(document.querySelectorAll('figure img')).map(each => {
        const box = each.getBoundingClientRect()
        return {natural: [each.naturalWidth, each.naturalHeight], text: each.alt, complete: each.complete,
                clip: {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}}})"""
    plots = shown.value(told)
    assert len(plots) == PLOTS
    for plot in plots:
        assert plot["complete"]
        assert min(plot["natural"]) > 200
        assert len(plot["text"]) > 20
        assert plot["clip"]["width"] > 300
        drawn = pixels(shown.screenshot(plot["clip"]))
        assert len({tuple(pixel) for row in drawn[::2, ::2].tolist() for pixel in row}) > 30
    assert shown.value("Array.from(document.querySelectorAll('h2')).map(each => each.textContent)") == SECTIONS
    assert shown.value("document.querySelectorAll('table').length") == 7
    tensors = shown.value(
        "Array.from(document.querySelectorAll('table:last-of-type td')).map(each => each.textContent)"
    )
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert shown.value("document.querySelector('table tbody th').textContent") == "tuned0"


@needs_browser
def test_nothing_is_asked_of_any_host(shown: Browser, comparison: Path) -> None:
    """Neither by the network log, nor by what arrives at the only way out; nor is there anything to complain of."""
    assert shown.requests[0] == comparison.as_uri()
    assert all(address.startswith("data:image/svg+xml;") for address in shown.requests[1:])
    assert len(shown.requests) == 1 + PLOTS
    assert shown.connections == []
    assert shown.complaints == []
    text = comparison.read_text()
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?(?!data:|#)[^"'\s>]+""", text)
    assert not re.search(r"<script|<link|<iframe|@import|url\(", text)


@needs_browser
def test_the_browser_would_tell(chromium: Browser, tmp_path: Path) -> None:
    """A page that loads something, and one that complains, are noticed: the test above would fail."""
    chromium.connections.clear()
    (tmp_path / "bad.html").write_text("<img src='http://elsewhere.invalid/x.png'><script>console.error('oh')</script>")
    chromium.open((tmp_path / "bad.html").as_uri())
    assert "http://elsewhere.invalid/x.png" in chromium.requests
    assert "GET http://elsewhere.invalid/x.png HTTP/1.1" in chromium.connections
    assert any('"oh"' in each for each in chromium.complaints)


_CONTRASTS = """(() => {
    const parts = colour => colour.match(/[0-9.]+/g).map(Number)
    const light = colour => parts(colour).slice(0, 3).map(each => each / 255)
        .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0)
    const behind = each => {
        const colour = getComputedStyle(each).backgroundColor
        return parts(colour)[3] === 0 && each.parentElement ? behind(each.parentElement) : colour
    }
    const found = {}
    for (const each of document.querySelectorAll('h1, h2, p, a, dt, dd, th, td, caption, figcaption, footer')) {
        const [one, other] = [light(getComputedStyle(each).color), light(behind(each))].sort((a, b) => b - a)
        found[each.tagName] = Math.min(found[each.tagName] ?? 99, (one + 0.05) / (other + 0.05))
    }
    return found
})()"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(scheme: str, shown: Browser) -> None:
    """Contrasts of at least 4.5, which WCAG 2 asks of text; the page is as light or dark as is asked for."""
    shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    contrasts = shown.value(_CONTRASTS)
    assert {"H1", "H2", "P", "A", "DT", "DD", "TH", "TD", "CAPTION", "FIGCAPTION", "FOOTER"} <= contrasts.keys()
    assert min(contrasts.values()) >= 4.5, contrasts
    corner = pixels(shown.screenshot())[:20, :20, :3].mean()
    assert corner > 0.95 if scheme == "light" else corner < 0.2


@needs_browser
def test_a_narrow_screen_scrolls_tables_and_not_the_page(shown: Browser) -> None:
    shown.ask("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=False)
    assert shown.value("document.documentElement.scrollWidth") <= 360
    shown.ask("Emulation.clearDeviceMetricsOverride")


_LETTERS = """Array.from(document.querySelectorAll('figure img')).map(each => {
    const scale = each.getBoundingClientRect().width / each.naturalWidth
    return {letter: 8 * 4 / 3 * scale, width: each.getBoundingClientRect().width,
            room: each.parentElement.clientWidth, background: getComputedStyle(each).backgroundColor}})"""
"""Of each figure: the height of its smallest letters on the screen, its width, and the room that it has."""


_CAPTIONS = """Array.from(document.querySelectorAll('caption span')).map(each => {
    const box = each.getBoundingClientRect()
    return [box.left, box.right]})"""

MADE: dict[str, tuple[Callable[[int], str], int]] = {
    "comparison": (lambda count: page(figures.comparison(count)).html(), PLOTS),
    "recycling": (lambda count: recycling_page(figures.report(count)), 3),
    "merge": (lambda count: merge_page(figures.merge_report(count)).html(), 4),
    "merge without a base": (lambda count: merge_page(figures.merge_report(count, changes=False)).html(), 2),
}
"""Pages of a number of models, and the number of their figures."""


@needs_browser
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("comparison", n) for n in (2, 5, 30, 300)),
        *(("recycling", n) for n in (2, 30)),
        *(("merge", n) for n in (2, 30)),
        ("merge without a base", 5),
    ],
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_legible_on_any_screen(
    scheme: str, kind: str, count: int, chromium: Browser, tmp_path: Path
) -> None:
    """On a phone and a large screen: letters of 8 pixels or more, and a page that scrolls in one direction only.

    Captions of tables are whole, and the paper of figures is the page's.
    """
    make, plots = MADE[kind]
    (tmp_path / "page.html").write_text(make(count), encoding="utf-8")
    chromium.connections.clear()
    chromium.open((tmp_path / "page.html").as_uri())
    assert len(chromium.requests) == 1 + plots
    assert chromium.connections == chromium.complaints == []
    chromium.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for width in (420, 1200):
        chromium.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert chromium.value("document.documentElement.scrollWidth") <= width
        drawn = chromium.value(_LETTERS)
        assert len(drawn) == plots
        assert all(0 <= left < right <= width for left, right in chromium.value(_CAPTIONS))
        assert min(each["letter"] for each in drawn) >= 8
        if width == 1200:
            assert all(each["width"] <= each["room"] for each in drawn)
        clip = chromium.value("(box => ({x: box.x, y: box.y + scrollY}))"
                              "(document.querySelector('figure img').getBoundingClientRect())")  # fmt: skip
        corner = pixels(chromium.screenshot(clip | {"width": 3, "height": 3}))[..., :3].mean()
        assert corner > 0.95 if scheme == "light" else corner < 0.2
        assert min(chromium.value(_CONTRASTS).values()) >= 4.5
    chromium.ask("Emulation.clearDeviceMetricsOverride")


@needs_browser
@pytest.mark.parametrize("count", [2, 300])
def test_blocks_and_models_are_counted(count: int, chromium: Browser, tmp_path: Path) -> None:
    """The number of blocks is right, though there are tensors outside of them."""
    page(figures.comparison(count)).write(tmp_path / "page.html")
    chromium.open((tmp_path / "page.html").as_uri())
    facts = chromium.value("Array.from(document.querySelectorAll('dl:first-of-type dd')).map(each => each.textContent)")
    assert facts[:3] == [str(count), "base", "12"]
    first = chromium.value("document.querySelector('tbody th').textContent")
    assert first.startswith("1. ") == (count > LABELLED), "maps of many models have the numbers of this table"


@needs_browser
@pytest.mark.parametrize("kind", MADE)
def test_print_is_light_and_whole(kind: str, chromium: Browser, tmp_path: Path) -> None:
    """On paper nothing scrolls, figures are legible and no wider than the page, and the dark scheme does not hold."""
    (tmp_path / "page.html").write_text(MADE[kind][0](30), encoding="utf-8")
    chromium.open((tmp_path / "page.html").as_uri())
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    chromium.ask("Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1, mobile=False)
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.value("Array.from(document.querySelectorAll('.wide')).every(each => "
                          "getComputedStyle(each).overflowY == 'visible')")  # fmt: skip
    assert all(each["width"] <= 720 and each["letter"] >= 8 for each in chromium.value(_LETTERS))
    chromium.ask("Emulation.clearDeviceMetricsOverride")
    chromium.ask("Emulation.setEmulatedMedia", media="", features=[])


@needs_browser
def test_names_of_others_do_nothing(chromium: Browser, tmp_path: Path) -> None:
    """What is text stays text, in a page and in its drawings."""
    chromium.connections.clear()
    base, (one, two) = tiny.checkpoint(tmp_path, 2)
    hostile = one.rename(tmp_path / HOSTILE.replace("/", "|"))
    made = page(compare([hostile, two], base=base)).text(HOSTILE).note(HOSTILE).facts({HOSTILE: HOSTILE})
    made.table([HOSTILE], [[HOSTILE]], HOSTILE).section(HOSTILE)
    made.write(tmp_path / "page.html")
    chromium.open((tmp_path / "page.html").as_uri())
    assert not [address for address in chromium.requests[1:] if not address.startswith("data:image/svg+xml;")]
    assert chromium.connections == chromium.complaints == []
    assert chromium.value("document.querySelectorAll('script, main img:not(figure img)').length") == 0
    assert HOSTILE in chromium.value("document.body.innerText")


def test_pieces_of_a_page() -> None:
    """As text, where there is no browser."""
    made = Page("A & B", "lead").section("One", "text").facts({"size": 1234, "none": None})
    made.table(["", "norm", "kind"], [["a", 1234.5678, "x"], ["b", 0.25, None]], "caption").note("careful")
    text = made.html()
    assert text.startswith("<!DOCTYPE html>\n")
    for piece in (
        "<title>A &amp; B</title>",
        "<dt>size</dt><dd>1,234</dd><dt>none</dt><dd>&ndash;</dd>",
        '<th scope="row">a</th><td class="n">1,235</td><td>x</td>',
        '<th scope="row">b</th><td class="n">0.25</td><td>&ndash;</td>',
        '<p class="note">careful</p>',
        "default-src &#x27;none&#x27;",
    ):
        assert piece in text
    with pytest.raises(ValueError, match="a cell for each column"):
        made.table(["one"], [["a", "b"]])


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written: "):
        Page("title").write(tmp_path / "page.html")
    assert [path.name for path in tmp_path.rglob("*")] == ["page.html"]
    Page("title").write(tmp_path / "missing" / "page.html")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        Page("title").write(tmp_path / "missing" / "page.html" / "page.html")
    assert [path.name for path in (tmp_path / "missing").iterdir()] == ["page.html"]
