"""The report as one HTML page: the verdict, the rows, and pictures where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from merging.display import Cell
from merging.recycling.bootstrap import LEVEL
from merging.recycling.report import MERGE, Report, Row
from merging.report import Page
from merging.report.drawing import Panel, draw_svg, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["page"]

_SHOWN = 40
"""The most adapters that are listed."""


def page(report: Report) -> str:
    """Return a self-contained HTML page. Without matplotlib (the extra ``report``) it has only tables."""
    facts = report.facts
    made = Page("Recycled adapters", f"{report.verdict.sentence}.")
    counts = report.examples
    settings = facts["settings"]
    made.facts(
        {
            "base": facts["base"],
            "examples": f"{counts['train']} to tune on, {counts['valid']} to validate on, {counts['test']} to test on",
            "adapters": f"{len(facts['chosen'])} chosen of {facts['candidates']} by {settings['select']}",
            "method": settings["method"],
            "result": f"rank {facts['fold']['rank']}, {facts['fold']['energy_kept']:.2%} of the energy kept",
        }
    )
    for notice in report.notices:
        made.note(notice)
    _rows(made, report)
    if find_spec("matplotlib") is None:
        made.note("Pictures need matplotlib: pip install 'merging[report]', and run it again.")
    else:
        for panel in _panels(report):
            made.figure(draw_svg(panel), f"{panel.title}: {panel.caption}")
    _adapters(made, facts)
    return made.html()


def _rows(made: Page, report: Report) -> None:
    on = "test" if report.tested else "validation"
    made.section(
        "Comparison of the merge",
        "Every run measures the same rows. The last rows are mixtures of adapters without any knowledge, tuned in the "
        "same way: their gain is not knowledge of the adapters.",
    )
    header, *rows = report.table()
    made.table(
        ["row", *header[1:-1], "remark"],
        [list(row) for row in rows],
        f"On {on} examples; accuracy in per cent; intervals are paired bootstraps of {LEVEL:.0%}.",
    )


def _adapters(made: Page, facts: dict[str, Any] | Any) -> None:
    made.section("The adapters")
    weights = facts["weights"]["by_adapter"]
    rows: list[list[Cell]] = [
        [each["name"], each["owner"], each["rank"], each["loss"], _mean(weights.get(each["name"], []))]
        for each in facts["chosen"][:_SHOWN]
    ]
    made.table(
        ["adapter", "owner", "rank", "loss alone", "mean weight"],
        rows,
        "Loss on the training and validation examples; the mean of its final coefficients.",
    )
    correlation = facts["selection_correlation"]
    if correlation is not None:
        made.text(f"Rank correlation of the selection's scores with the chosen adapters' losses: {correlation:.2f}.")
    others = {**facts["passed_over"], **facts["left_out"]}
    if others:
        made.table(["not mixed", "why"], [[name, why] for name, why in list(others.items())[:_SHOWN]])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _panels(report: Report) -> list[Panel]:
    panels = [
        Panel(
            "Lead of the merge",
            f"differences in {report.metric} with {LEVEL:.0%} intervals; a row is beaten if its interval is above zero",
            lambda axes: _ahead(axes, report.rows, report.metric),
            (7.0, 0.6 + 0.42 * len(report.rows)),
        )
    ]
    curves = {name: curve for name, curve in report.facts["curves"].items() if len(curve) > 1}
    if curves:
        panels.append(Panel("Tuning", "loss by step; the result has the lowest validation loss",
                            lambda axes: _curves(axes, curves)))  # fmt: skip
    weights = report.facts["weights"]
    if len(weights["groups"]) > 1:
        caption = f"of each adapter (rows) by {weights['granularity']} (columns)"
        size = 7.0, 1.4 + 0.22 * len(weights["by_adapter"])
        panels.append(Panel("Coefficients", caption, lambda axes: _weights(axes, weights), size))
    return panels


def _ahead(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    compared = [row for row in rows if row.ahead is not None][::-1]
    times = 100 if metric == "accuracy" else 1
    for height, row in enumerate(compared):
        assert row.ahead is not None
        low, mean, high = (times * value for value in (row.ahead.low, row.ahead.mean, row.ahead.high))
        color = "#24549c" if row.ahead.above else "#9a6b15"
        axes.plot([low, high], [height, height], color=color, linewidth=2)
        axes.plot([mean], [height], marker="o", color=color)
    axes.axvline(0, color="#5b6477", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [plain(row.title) for row in compared])
    axes.set_xlabel("points of accuracy" if metric == "accuracy" else "lower loss")


def _curves(axes: Axes, curves: dict[str, Any]) -> None:
    for name, curve in curves.items():
        title = MERGE if name == "merge" else name
        steps, training, valid = zip(*curve, strict=True)
        (line,) = axes.plot(steps, training, linewidth=0.8, linestyle=":", label=f"{title}, minimized")
        if None not in valid:
            axes.plot(steps, valid, color=line.get_color(), marker="o", markersize=3, label=f"{title}, validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize=7)


def _weights(axes: Axes, weights: dict[str, Any]) -> None:
    import numpy as np

    table = weights["by_adapter"]
    values = np.array([[np.nan if v is None else v for v in row] for row in table.values()], dtype=float)
    most = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
    axes.set_yticks(range(len(table)), [plain(name)[-28:] for name in table])
    axes.set_xlabel(f"{len(weights['groups'])} groups, from {weights['groups'][0]} to {weights['groups'][-1]}"[:90])
