"""The report of a search as one HTML page: the winner, every candidate, and pictures where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from merging.recycling.bootstrap import LEVEL
from merging.report import Page
from merging.report.charts import count_along, short_labels
from merging.report.drawing import Panel, draw_svg
from merging.report.style import DOUBTFUL, GOOD, LIGHT, series_styles
from merging.searches.report import ComparedRow, SearchReport
from merging.searches.trials import show_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["search_page", "search_panels"]


def search_page(report: SearchReport) -> str:
    """Return a self-contained HTML page. Without matplotlib (the extra ``report``) it has only tables."""
    facts = report.facts
    made = Page("Search for a merge", f"{report.verdict}.")
    counts = facts["examples"]
    made.facts(
        {
            "models": ", ".join(facts["models"]),
            "base": facts["base"] or "none",
            "chosen by": report.metric or "a scoring command",
            "examples": f"{sum(counts['valid'])} to choose by, {sum(counts['test'])} to report on",
            "tried": f"{facts['candidates']} candidates in {facts['evaluations']} evaluations",
            "seconds of evaluation": facts["seconds"],
            "strategy": facts["settings"]["strategy"],
        }
    )
    for notice in report.notices:
        made.note(notice)
    _write_rows(made, report)
    if find_spec("matplotlib") is None:
        made.note("Pictures need matplotlib: pip install 'merging[report]', and run it again.")
    else:
        for panel in search_panels(report):
            made.figure(draw_svg(panel), f"{panel.title}: {panel.caption}")
    _write_optimism(made, report)
    _write_candidates(made, report)
    return made.html()


def _write_rows(made: Page, report: SearchReport) -> None:
    on = "test examples, on which nothing was chosen" if report.tested else "examples that chose the winner"
    made.section("The winner and the trivial choices", f"Measured on the {on}.")
    several = report.tasks if len(report.tasks) > 1 else ()
    made.table(
        ["", report.metric or "score", *several, report.lead_heading, "candidate"],
        [[row.title, row.shown, *(row.tasks if several else ()), report.lead(row), row.name] for row in report.rows],
        "Intervals are paired bootstraps over the examples; tasks count equally; accuracy in per cent."
        if report.metric
        else "Scores of the command.",
    )


def _write_optimism(made: Page, report: SearchReport) -> None:
    made.section("The optimism of choosing")
    tried = report.facts["candidates"]
    if report.optimism is None:
        made.text(
            f"The best of {tried} candidates looks better on what chose it than it is. One score a candidate does not "
            "show how much: score the winner on other examples."
        )
        return
    times, unit = (100, "points") if report.metric in ("accuracy", "exact_match") else (1, "nats")
    made.text(
        f"The best of {tried} candidates looks better on the examples that chose it than on others: by about "
        f"{times * report.optimism:.2g} {unit} here, from resamples of these examples. Its score there was "
        f"{show_score(report.facts['winner']['valid'], report.metric)}."
    )


def _write_candidates(made: Page, report: SearchReport) -> None:
    made.section("Every candidate", "By the score on the examples to choose by; those on all examples first.")
    made.table(
        ["candidate", "score", "examples", "tried as number", "seconds", "remark"],
        [
            [
                row.name,
                row.shown,
                row.examples,
                row.number,
                row.seconds,
                row.error or ("" if row.complete else "dropped"),
            ]
            for row in report.trials
        ],
    )


def search_panels(report: SearchReport) -> list[Panel]:
    """Return the pictures of a search."""
    compared = [row for row in report.rows if row.ahead is not None]
    found = []
    if compared and report.metric:
        found.append(
            Panel(
                "Lead of the winner",
                f"over each trivial choice, with its {LEVEL:.0%} interval. The winner is ahead where the whole "
                "interval is to the right of 0 (filled circle, green); otherwise it is undecided, or behind (hollow "
                "triangle, orange).",
                lambda axes: _draw_lead(axes, compared, report),
                (5.2, 1.0 + 0.3 * len(compared)),
            )
        )
    complete = sorted((row for row in report.trials if row.complete and row.score is not None), key=lambda r: r.number)
    if len(complete) > 1:
        found.append(
            Panel(
                "Learning curve",
                "each candidate on all examples (points) and the best so far (line), by the evaluation in which it was "
                "first tried.",
                lambda axes: _draw_curve(axes, report),
            )
        )
    return found


def _draw_lead(axes: Axes, compared: Sequence[ComparedRow], report: SearchReport) -> None:
    accurate = report.metric in ("accuracy", "exact_match")
    times = 100 if accurate else 1
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
    axes.set_xlabel("lead in accuracy (percentage points)" if accurate else f"lead in {report.metric} (nats)")


def _draw_curve(axes: Axes, report: SearchReport) -> None:
    points = sorted((row.number, row.score) for row in report.trials if row.complete and row.score is not None)
    kept = report.metric is None and not report.facts["settings"]["minimize"]
    times = 100 if report.metric in ("accuracy", "exact_match") else 1 if kept else -1
    numbers = [number for number, _ in points]
    scores = [times * score for _, score in points]
    best = [max(scores[: place + 1], key=lambda value: value / times) for place in range(len(scores))]
    style = next(iter(series_styles()))
    axes.plot(numbers, scores, linestyle="", marker="o", markersize=3, color=LIGHT.soft)
    axes.plot(numbers, best, color=style["color"], drawstyle="steps-post")
    axes.set(xlabel="evaluation", ylabel=_unit(report))
    count_along(axes, "x")


def _unit(report: SearchReport) -> str:
    if report.metric is None:
        return "score"
    if report.metric in ("accuracy", "exact_match"):
        return f"{report.metric} (%)"
    return "entropy (nats)" if report.metric == "entropy" else "loss (nats)"
