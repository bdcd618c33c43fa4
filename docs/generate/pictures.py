"""Draw the pictures of docs/concepts.md into docs/pictures: python docs/generate/pictures.py."""

# ruff: noqa: RUF001 (signs of arithmetic as readers know them)

from __future__ import annotations

from html import escape
from math import atan2, cos, pi, sin
from pathlib import Path

from merging.report.style import DARK, DARK_SCREEN, LIGHT, Theme

FOLDER = Path(__file__).parents[1] / "pictures"
STYLE = """
text { font: 15px sans-serif; }
.small { font-size: 13px; }
.line { stroke-width: 1.5; fill: none; }
.dash { stroke-dasharray: 5 4; }
.box { fill-opacity: 0.14; stroke-width: 1.5; }
.full { fill-opacity: 0.55; stroke-width: 1.5; }
.arrow { stroke-width: 2.5; }
"""


def colors(theme: Theme) -> str:
    """Return the colors of a theme as rules for the classes of shapes."""
    rules = [
        f"text {{ fill: {theme.ink}; }}",
        f".small {{ fill: {theme.soft}; }}",
        f".line {{ stroke: {theme.soft}; }}",
    ]
    shapes = {"gray": theme.soft, "blue": theme.blue, "orange": theme.orange, "green": theme.green}
    rules += [f".{name} {{ stroke: {color}; fill: {color}; }}" for name, color in shapes.items()]
    return "\n".join(rules)


class Picture:
    """An SVG of 720 pixels' width, drawn shape by shape; it follows the reader's light or dark scheme."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", kind: str = "") -> None:
        mark = f' class="{kind}"' if kind else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{mark}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" class="{kind}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        self.shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, kind: str = "gray") -> None:
        """A line with a head at its second end."""
        angle, size = atan2(y2 - y1, x2 - x1), 11
        sides = [(x2 - size * cos(angle + turn), y2 - size * sin(angle + turn)) for turn in (-pi / 7, pi / 7)]
        neck = (x2 - 0.8 * size * cos(angle), y2 - 0.8 * size * sin(angle))
        self.line(x1, y1, *neck, kind=f"{kind} arrow")
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x2, y2), *sides])
        self.shapes.append(f'<polygon points="{points}" class="{kind}"/>')

    def svg(self) -> str:
        style = f"{STYLE}{colors(LIGHT)}\n{DARK_SCREEN} {{\n{colors(DARK)}\n}}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {self.height}" role="img" width="720" '
            f'height="{self.height}">\n<title>{escape(self.title)}</title>\n<style>{style}</style>\n'
        )
        return head + "\n".join(self.shapes) + "\n</svg>\n"


def task_vector() -> Picture:
    """Two fine-tunes of one base, and the sum of their task vectors, scaled."""
    picture = Picture("Task vectors: arrows from the base to fine-tunes, and their scaled sum", 270)
    base, one, two, merged = (150, 220), (330, 90), (450, 205), (483, 119)
    picture.line(*one, 630, 75, kind="line dash")
    picture.line(*two, 630, 75, kind="line dash")
    picture.arrow(*base, *one, kind="blue")
    picture.arrow(*base, *two, kind="orange")
    picture.arrow(*base, *merged, kind="green")
    picture.dot(*base, "gray")
    picture.dot(630, 75, "gray")
    picture.text(135, 226, "base", anchor="end")
    picture.text(330, 72, "fine-tune 1")
    picture.text(462, 228, "fine-tune 2", anchor="start")
    picture.text(495, 125, "merged", anchor="start")
    picture.text(642, 80, "sum", anchor="start")
    picture.text(225, 140, "task vector 1", anchor="end", kind="small")
    picture.text(320, 236, "task vector 2", kind="small")
    return picture


def delta() -> Picture:
    """A change of one weight matrix, in full and as a product of factors."""
    picture = Picture("A delta: the tuned matrix minus the base's, in full or as a product of two factors", 230)
    for x, kind, words in ((20, "blue", "tuned W"), (190, "gray", "base W"), (360, "green", "delta, in full")):
        picture.box(x, 40, 110, 110, f"{kind} box")
        picture.text(x + 55, 180, words)
    picture.text(160, 102, "−")
    picture.text(330, 102, "=")
    picture.text(500, 102, "=")
    picture.box(530, 40, 26, 110, "orange full")
    picture.box(578, 40, 110, 26, "orange full")
    picture.text(543, 28, "B")
    picture.text(633, 28, "A")
    picture.text(567, 58, "×")
    picture.text(612, 180, "delta of a LoRA")
    picture.text(415, 202, "outputs × inputs", kind="small")
    picture.text(612, 202, "two thin factors", kind="small")
    return picture


def chain() -> Picture:
    """Draw the steps of lines+dare+ties, from the changes to the merge."""
    picture = Picture("The chain lines+dare+ties: wrappers go around the method that merges", 250)
    picture.box(130, 30, 460, 190, "blue box")
    picture.box(230, 75, 260, 125, "orange box")
    picture.box(300, 115, 120, 65, "green full")
    picture.text(360, 55, "lines: scales the merged change by depth")
    picture.text(360, 100, "dare: drops entries at random")
    picture.text(360, 153, "ties: merges")
    for y in (128, 148, 168):
        picture.arrow(30, y, 298, y)
    picture.arrow(422, 148, 690, 148, kind="green")
    picture.text(66, 112, "changes")
    picture.text(655, 132, "merged")
    return picture


def rank() -> Picture:
    """The sum of two products is one product of concatenated factors."""
    picture = Picture("Ranks add up: the sum of two products is the product of concatenated factors", 230)
    for x, wide, kind, words in ((20, 24, "blue", "rank 8"), (215, 40, "orange", "rank 16")):
        picture.box(x, 50, wide, 110, f"{kind} full")
        picture.box(x + wide + 22, 50, 100, wide, f"{kind} full")
        picture.text(x + wide + 11, 68, "×")
        picture.text(x + 80, 195, words)
    picture.text(190, 110, "+")
    picture.text(405, 110, "=")
    picture.box(430, 50, 24, 110, "blue full")
    picture.box(454, 50, 40, 110, "orange full")
    picture.box(520, 50, 100, 24, "blue full")
    picture.box(520, 74, 100, 40, "orange full")
    picture.text(507, 68, "×")
    picture.text(525, 195, "rank 24, nothing lost")
    picture.text(525, 216, "--rank 8 keeps the best 8", kind="small")
    picture.text(32, 40, "B₁", kind="small")
    picture.text(116, 40, "A₁", kind="small")
    picture.text(235, 40, "B₂", kind="small")
    picture.text(327, 40, "A₂", kind="small")
    picture.text(462, 40, "B₁ B₂", kind="small")
    picture.text(570, 40, "A₁ over A₂", kind="small")
    return picture


def scope() -> Picture:
    """A threshold for the whole model, and one for each tensor."""
    picture = Picture("Scope: one threshold over the whole model, or one for each tensor", 270)
    tensors = ((95, 80, 62, 50, 40), (60, 48, 36, 28, 20), (34, 26, 20, 14, 9))
    for left, own in ((40, False), (400, True)):
        picture.text(left + 140, 30, "--scope tensor" if own else "--scope model")
        for number, heights in enumerate(tensors):
            cut = sorted(heights)[-2] if own else 50
            x = left + 100 * number
            for i, height in enumerate(heights):
                kind = "green full" if height >= cut else "gray box"
                picture.box(x + 16 * i, 200 - 1.5 * height, 13, 1.5 * height, kind)
            picture.text(x + 38, 222, f"tensor {number + 1}", kind="small")
            if own:
                picture.line(x - 5, 200 - 1.5 * cut, x + 83, 200 - 1.5 * cut, kind="line dash")
        if not own:
            picture.line(left - 5, 125, left + 283, 125, kind="line dash")
    picture.text(360, 255, "sizes of entries: what stays is colored, the dashed line is the threshold", kind="small")
    return picture


def store() -> Picture:
    """Models come one at a time; each makes a state, of the same size as the one before."""
    picture = Picture("A continual store: each model that arrives makes a new state of the same size", 250)
    picture.box(20, 110, 680, 90, "gray box")
    picture.text(30, 225, "store/: states and a manifest, and not the models", anchor="start", kind="small")
    for number, words in enumerate(("base", "1 model", "2 models", "3 models")):
        x = 50 + 170 * number
        picture.box(x, 130, 110, 50, "green full")
        picture.text(x + 55, 160, words)
        if number:
            picture.arrow(x - 60, 155, x - 2, 155)
            kind = ("blue", "orange", "blue")[number - 1]
            picture.box(x + 15, 25, 80, 36, f"{kind} box")
            picture.text(x + 55, 48, f"model {number}")
            picture.arrow(x + 55, 61, x + 55, 128, kind=kind)
    return picture


PICTURES = {
    "task-vector": task_vector,
    "delta": delta,
    "chain": chain,
    "rank": rank,
    "scope": scope,
    "store": store,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
