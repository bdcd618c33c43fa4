"""Records of any number of models to draw, and checks of drawn figures by their artists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

from merging.api.merge_report import MeasuredTensor, MergeReport
from merging.continual.manifest import Part, StepRecord
from merging.engine.measures import Measure
from merging.geometry.comparison import (
    Agreement,
    Comparison,
    IntruderCount,
    LayerNorms,
    Matrix,
    Overlaps,
    Profile,
)
from merging.geometry.spectrum import Spectrum
from merging.maths.intruders import Intruders
from merging.pool.entry import VERDICTS, Entry
from merging.recycling.bootstrap import Gap
from merging.recycling.report import Report, Row
from merging.recycling.verdict import TransferVerdict

__all__ = ["comparison", "drawn_texts", "entries", "faults", "merge_report", "report", "steps"]

_CROPPED = 6
"""Pixels over the edge that are no fault, since a picture is cropped to what is drawn."""

LONG = "organization-with-a-long-name/model-{}-fine-tuned-on-a-task"


def _matrix(random: np.random.Generator, count: int, middle: float, spread: float, diagonal: float) -> Matrix:
    values = middle + spread * random.standard_normal((count, count))
    values = (values + values.T) / 2
    return tuple(tuple(diagonal if i == j else float(values[i, j]) for j in range(count)) for i in range(count))


def comparison(count: int, *, blocks: int = 12) -> Comparison:
    """A comparison that has all figures, of models with long names, and tensors outside their blocks."""
    random = np.random.default_rng(count)
    names = [LONG.format(number) for number in range(count)]
    shares = np.linspace(0.3, 1, 16)
    models = tuple(
        Profile(name, name, "adapter", 24, (16,), 5.0, 24, Spectrum(1.0, 4.0, 3.0, 6, 9, tuple(shares ** (1 + i % 3))))
        for i, name in enumerate(names)
    )
    places: list[int | None] = [*range(blocks), None]
    norms = 1 + random.random((len(places), count))
    layers = tuple(LayerNorms(place, tuple(map(float, row)), 0.1) for place, row in zip(places, norms, strict=True))
    found = Intruders(tuple(random.random(10)), (0.0,) * 10, (1.0,) * 10, (0, 1), 0.1)
    return Comparison(
        models=models,
        base="base",
        cosines=_matrix(random, count, 0.1, 0.02, 1.0),
        layers=layers,
        magnitudes=None,
        overlaps=Overlaps(*(_matrix(random, count, 0.1, 0.01, 1.0),) * 2, 16, 0.029, 0.03),
        signs=Agreement(_matrix(random, count, 0.52, 0.01, 1.0), 100, 100),
        intruders=tuple(IntruderCount(2, 24, 1, 10, 0.1, 1.0, {"a": found}) for _ in names),
        notices=(),
    )


def steps(ranks: Sequence[int]) -> list[StepRecord]:
    """The steps of a store whose state has these ranks; 0 is full."""
    part = {"merge": Part(file="states/000001-a/merge.safetensors", sha256="0" * 64, bytes=1)}
    return [
        StepRecord(
            number=number,
            source="model",
            sha256="0" * 64,
            kind="adapter" if rank else "model",
            stated_base=None,
            time="2026-01-01T00:00:00+00:00",
            parts=part,
            norm=5.0 + number % 3,
            kept=1 - 0.1 * (number % 2),
            cosine=1 / number**0.5,
            merged=5.0 * number**0.5,
            rank=rank,
            factored=bool(rank),
            full=not rank,
            discarded=0.0,
        )
        for number, rank in enumerate(ranks, 1)
    ]


def entries(count: int) -> list[Entry]:
    """Adapters of a pool, of all verdicts, with many ranks, and norms over four orders of size."""
    random = np.random.default_rng(count)
    return [
        Entry(
            name=LONG.format(number),
            verdict=VERDICTS[min(number % 7, 3) if number % 7 < 4 else 0],
            rank=[4, 8, 16, 32, 64, 128][number % 6] if number < 30 else number,
            figures={"relative_norm": float(10 ** random.uniform(-3, 0.5))},
        )
        for number in range(count)
    ]


def report(count: int) -> Report:
    """A run of recycling with this number of adapters, and curves of tuning."""
    random = np.random.default_rng(count)
    rows = tuple(
        Row(
            f"baseline number {i} with a long title",
            "",
            0.5,
            0.8,
            Gap(-0.01 + 0.01 * i, -0.04 + 0.01 * i, 0.03 + 0.01 * i),
        )
        for i in range(9)
    )
    names = [LONG.format(number) for number in range(count)]
    curve = [(step, 0.7 - 0.01 * step, 0.7 - 0.008 * step) for step in range(0, 21, 5)]
    groups = [f"encoder.layer.{i}" for i in range(12)]
    facts = {
        "curves": {"merge": curve, "few-shot LoRA": curve},
        "weights": {
            "groups": groups,
            "granularity": "layer",
            "by_adapter": {name: list(map(float, random.normal(0, 0.2, 12))) for name in names},
        },
        "base": "organization/base",
        "settings": {"select": "evaluation", "method": "ours"},
        "candidates": count + 2,
        "chosen": [{"name": name, "owner": "organization", "rank": 8, "loss": 0.7} for name in names],
        "fold": {"rank": 32, "energy_kept": 0.987},
        "selection_correlation": 0.42,
        "passed_over": {LONG.format(count): "is worse alone than the chosen adapters"},
        "left_out": {LONG.format(count + 1): "does not fit the base"},
    }
    examples = {"train": 80, "valid": 20, "test": 300}
    return Report(rows, TransferVerdict(True, "it transfers"), "accuracy", True, examples, facts, ("a remark",))


def merge_report(count: int, *, blocks: int = 12, changes: bool = True) -> MergeReport:
    """The report of a merge that has everything in it, of models and tensors with long names."""
    random = np.random.default_rng(count)
    parts = ("self_attention.query_projection.weight", "mlp.up_projection.weight", "input_layernorm.weight")
    places = [(f"model.layers.{block}", f"model.layers.{block}.{part}") for block in range(blocks) for part in parts]
    places = [("IN", "model.embed_tokens.weight"), *places, ("OUT", "lm_head.weight")]

    def measure() -> Measure:
        sizes = 1 + random.random(count)
        products = tuple(map(float, random.normal(0.5, 0.6, count)))
        numbers = [1e6, 1e6, 400.0, float(sizes.sum()), 1000.0, 400 + 100 * float(random.random()), 700.0]
        return Measure.of_numbers([*numbers, *map(float, sizes), *products, *products])

    tensors = tuple(
        MeasuredTensor(
            name=name,
            shape=(1000, 1000),
            block=block,
            kind=re.sub(r"\d+", "*", name),
            measure=measure(),
            discarded=float(random.random()) / 10,
            quantization_error=float(random.random()) / 100,
        )
        for block, name in places
    )
    names = tuple(LONG.format(number) for number in range(count))
    return MergeReport(
        path="merged",
        kind="model",
        method="lines+task_arithmetic",
        parameters={"weights": [1.0] * count},
        models=names,
        paths=names,
        base="organization/base" if changes else None,
        changes=changes,
        tensors=tensors,
        others=("a.tensor.of.one.model",),
        missing=("a.tensor.that.was.merged.before",),
        copied=3,
        phases={"preparing": 1.5, "gathering statistics": 10.0, "merging": 20.0, "making it durable": 3.0},
        work={"reading": 20.0, "measuring": 5.0, "writing": 9.0},
        sources=tuple({"model": name, "weights": "0" * 16, "tensors": 100, "bytes": 10**9} for name in names),
        stages={"models.1": "ties"},
        notices=("a remark",),
    )


def drawn_texts(figure: Any) -> list[Any]:
    """Return the texts that are drawn: of ticks only those within the limits."""
    figure.canvas.draw()
    outside = set()
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - slack <= tick.get_loc() <= high + slack:
                    outside |= {tick.label1, tick.label2}
    texts = figure.findobj(lambda each: isinstance(each, Text) and each.get_visible() and each.get_text().strip())
    return [each for each in dict.fromkeys(texts) if each not in outside]


def faults(figure: Any) -> list[str]:
    """Return everything about the texts of a figure that a reader would stumble over: cut off, or over each other."""
    texts = drawn_texts(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [(each, each.get_window_extent(renderer)) for each in texts]
    width, height = figure.canvas.get_width_height()
    out = [
        f"cut off: {each.get_text()!r}"
        for each, box in boxes
        if min(box.x0, box.y0, width - box.x1, height - box.y1) < -_CROPPED
    ]
    for (one, first), (other, second) in combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        if wide > 1 and high > 1 and not _parallel(one, other, first, second):
            out.append(f"over each other: {one.get_text()!r} and {other.get_text()!r}")
    return out


def _parallel(one: Any, other: Any, first: Any, second: Any) -> bool:
    """Whether two slanted texts are next to each other, though the rectangles around them overlap."""
    turn = np.deg2rad(one.get_rotation())
    if one.get_rotation() != other.get_rotation() or one.get_rotation() % 90 == 0:
        return False
    # Both end at the right top corner of their rectangles.
    apart = abs((first.x1 - second.x1) * np.sin(turn) - (first.y1 - second.y1) * np.cos(turn))
    return bool(apart > 0.9 * one.get_fontsize() * one.figure.dpi / 72)
