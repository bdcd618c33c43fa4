"""The report as one HTML page: the verdict, the rows, and pictures where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any

from merging.display.tables import Cell
from merging.recycling.bootstrap import LEVEL
from merging.recycling.report import MERGE, Report, Row
from merging.report import Page
from merging.report.charts import Scale, count_along, legend, paint, short_labels
from merging.report.drawing import Panel, draw_svg
from merging.report.fonts import shorten_drawable
from merging.report.style import DOUBTFUL, GOOD, LIGHT, series_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["page", "panels"]

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
        for panel in panels(report):
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


def panels(report: Report) -> list[Panel]:
    compared = [row for row in report.rows if row.ahead is not None]
    found = [
        Panel(
            "Lead of the merge",
            f"over each row, with its {LEVEL:.0%} interval. The merge beats a row whose whole interval is to the right "
            "of 0 (filled circle, green); otherwise it is undecided, or behind (hollow triangle, orange).",
            lambda axes: _ahead(axes, compared, report.metric),
            (5.2, 1.0 + 0.3 * len(compared)),
        )
    ]
    curves = {name: curve for name, curve in report.facts["curves"].items() if len(curve) > 1}
    if curves:
        found.append(
            Panel(
                "Tuning",
                "the loss by step, on the training texts (dotted) and on the validation texts (with markers). The "
                "result is the step of the lowest validation loss.",
                lambda axes: _curves(axes, curves),
            )
        )
    weights = report.facts["weights"]
    if len(weights["groups"]) > 1:
        caption = (
            f"of each adapter (rows) by {weights['granularity']} (columns): red adds what the adapter changed, blue "
            "subtracts it, and pale leaves it out."
        )
        size = 5.2, 1.4 + 0.22 * len(weights["by_adapter"])
        found.append(Panel("Coefficients", caption, lambda axes: _weights(axes, weights), size))
    return found


def _ahead(axes: Axes, compared: Sequence[Row], metric: str) -> None:
    times = 100 if metric == "accuracy" else 1
    for height, row in enumerate(compared):
        assert row.ahead is not None
        low, mean, high = (times * value for value in (row.ahead.low, row.ahead.mean, row.ahead.high))
        mark = GOOD if row.ahead.above else DOUBTFUL
        axes.plot([low, high], [height, height], color=mark.color)
        inside = mark.color if row.ahead.above else LIGHT.paper
        axes.plot([mean], [height], marker=mark.marker, color=mark.color, markerfacecolor=inside, markersize=6)
    axes.axvline(0, color=LIGHT.soft, linewidth=0.8)
    axes.set_yticks(range(len(compared)), short_labels([row.title for row in compared], 30))
    axes.invert_yaxis()
    axes.set_xlabel("lead in accuracy (percentage points)" if metric == "accuracy" else "lead in loss (nats)")


def _curves(axes: Axes, curves: dict[str, Any]) -> None:
    for (name, curve), style in zip(curves.items(), series_styles(), strict=False):
        title = MERGE if name == "merge" else name
        steps, training, valid = zip(*curve, strict=True)
        axes.plot(steps, training, linewidth=1.2, linestyle=":", color=style["color"], label=f"{title}, training")
        if None not in valid:
            axes.plot(steps, valid, label=f"{title}, validation", **style)
    axes.set(xlabel="step", ylabel="loss (nats)")
    count_along(axes, "x")
    legend(axes, 30)


def _weights(axes: Axes, weights: dict[str, Any]) -> None:
    import numpy as np

    table, groups = weights["by_adapter"], weights["groups"]
    values = np.array([[np.nan if v is None else v for v in row] for row in table.values()], dtype=float)
    reach = max(1, ceil(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1
    paint(axes, values, Scale("coefficient", -reach, reach))
    axes.set_yticks(range(len(table)), short_labels(list(table)))
    step = -(-len(groups) // 12)
    axes.set_xticks(range(0, len(groups), step), [str(number + 1) for number in range(0, len(groups), step)])
    first, last = (shorten_drawable(group, 30) for group in (groups[0], groups[-1]))
    axes.set_xlabel(f"{weights['granularity']}: 1 is {first}, {len(groups)} is {last}")
