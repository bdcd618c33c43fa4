"""The pictures of a merge's report: sizes, contributions and interference by block and kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merging.api.merge_report import Group, MeasuredTensor, MergeReport
from merging.engine.measures import Measure
from merging.report.charts import BANDS, FEW, Scale, lines, lines_size, paint, short_labels
from merging.report.drawing import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["panels", "size_of"]

_KINDS = 24
"""The most kinds of tensors in a map."""

_NAN = float("nan")


def panels(report: MergeReport) -> list[Panel]:
    """Return the pictures that the report has values for."""
    blocks = report.blocks
    if len(blocks) < 2:
        return []
    found = [_size_panel(report, blocks), _map_panel(report, blocks)]
    if report.changes and len(report.models) > 1:
        found += [_share_panel(report, blocks), _interference_panel(blocks)]
    return found


def size_of(report: MergeReport) -> tuple[str, Callable[[float, Measure], float]]:
    """Return what sizes are measured in, and a function of a norm and the measure that it belongs to."""
    if not report.changes:
        return "relative difference", lambda norm, of: norm / of.norm if of.norm else _NAN
    if any(each.measure.base for each in report.tensors):
        return "relative change", lambda norm, of: norm / of.base**0.5 if of.base else _NAN
    return "norm of the change", lambda norm, of: norm


def _size_panel(report: MergeReport, blocks: Sequence[Group]) -> Panel:
    label, size = size_of(report)
    curves = {"the merge": [size(group.measure.norm, group.measure) for group in blocks]} if report.changes else {}
    for number, name in enumerate(report.models):
        curves[name] = [size(group.measure.norms[number], group.measure) for group in blocks]
    whose = "of the merge and of each model" if report.changes else "of each model"
    return _lines_panel("size by block", f"The {label} {whose} in each block; higher is larger.", curves, label)


def _share_panel(report: MergeReport, blocks: Sequence[Group]) -> Panel:
    curves = {
        name: [_number(group.measure.shares[number]) for group in blocks] for number, name in enumerate(report.models)
    }
    caption = "Each model's share of the merged change in each block; all shares of a block add up to 1."
    return _lines_panel("contribution by block", caption, curves, "share of the merged change", below_zero=True)


def _interference_panel(blocks: Sequence[Group]) -> Panel:
    curves = {
        "in conflict": [_number(group.measure.conflict) for group in blocks],
        "cancelled": [_number(group.measure.cancelled) for group in blocks],
    }
    caption = (
        "Interference in each block: the share of the magnitudes in elements that models change in opposite "
        "directions, and the share that their sum loses. 0 is no interference, 1 is the most."
    )
    return _lines_panel("interference by block", caption, curves, "share of the magnitudes")


def _lines_panel(
    title: str, caption: str, curves: dict[str, list[float]], label: str, *, below_zero: bool = False
) -> Panel:
    def draw(axes: Axes) -> None:
        lines(axes, curves, ("block (its place in the table)", label))
        if below_zero and any(value < 0 for values in curves.values() for value in values):
            axes.set_ylim(bottom=None)
            axes.relim()
            axes.autoscale(axis="y")

    bands = f" {BANDS}" if len(curves) > FEW else ""
    return Panel(title, f"{caption}{bands}", draw, lines_size(list(curves)))


def _map_panel(report: MergeReport, blocks: Sequence[Group]) -> Panel:
    """Return the map of sizes by kind of tensor (rows) and block (columns)."""
    label, size = size_of(report)
    kinds = [group.name for group in report.kinds[:_KINDS]]
    places = {kind: row for row, kind in enumerate(kinds)}
    cells: list[list[list[MeasuredTensor]]] = [[[] for _ in blocks] for _ in kinds]
    for column, block in enumerate(blocks):
        for each in block.tensors:
            if each.kind in places:
                cells[places[each.kind]][column].append(each)

    def measure(tensors: list[MeasuredTensor]) -> float:
        if not tensors:
            return _NAN
        total = Measure.total(each.measure for each in tensors)
        return size(total.norm if report.changes else max(total.norms), total)

    grid = [[measure(cell) for cell in row] for row in cells]
    high = _round_up(max((value for row in grid for value in row if value == value), default=1.0))

    def draw(axes: Axes) -> None:
        import numpy as np

        paint(axes, np.array(grid), Scale(label, 0, high, "Blues"))
        axes.set_yticks(range(len(kinds)), short_labels(kinds, 30))
        step = -(-len(blocks) // 12)
        axes.set_xticks(range(0, len(blocks), step), [str(place + 1) for place in range(0, len(blocks), step)])
        axes.set(xlabel="block (its place in the table)", ylabel="kind of tensor")

    most = f" The {len(kinds)} kinds with the largest changes." if len(report.kinds) > len(kinds) else ""
    whose = "of the merge" if report.changes else "of the farthest model"
    caption = f"The {label} {whose} by kind of tensor (rows) and block (columns); darker is larger.{most}"
    return Panel("size by kind and block", caption, draw, (6.4, 1.4 + 0.24 * len(kinds)))


def _round_up(value: float) -> float:
    """Return the next number of the form 1, 2 or 5 times a power of ten."""
    power = 1e-12
    while value > 5 * power:
        power *= 10
    return next(round(times * power, 12) for times in (1, 2, 5) if value <= times * power) if value > 0 else 1.0


def _number(value: float | None) -> float:
    return _NAN if value is None else value
