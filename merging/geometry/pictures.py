"""Pictures and an HTML page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.geometry.comparison import Comparison, Matrix
from merging.report.drawing import Panel, draw_svg, heatmap, lines, save
from merging.report.page import Cell, Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["page", "panels", "plot"]

_PAIRS, _TENSORS, _MATRIX = 20, 40, 24
"""The most pairs of models and tensors that are listed, and the most models of a printed matrix."""

_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of the cosine below which singular vectors are intruders: the range in their paper."""


def plot(comparison: Comparison, output: str | Path) -> None:
    """Draw a comparison into one picture. It needs matplotlib (the extra ``report``).

    Args:
        comparison: The comparison.
        output: The file to write: PNG, SVG or PDF by its suffix.

    Raises:
        merging.errors.MergingError: Without matplotlib, for another suffix, and if the file cannot be written.
    """
    save(list(panels(comparison).values()), output, _title(comparison))


def _title(comparison: Comparison) -> str:
    names = comparison.names
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} models"


def panels(comparison: Comparison) -> dict[str, Panel]:
    """Return the panels that the comparison has values for, by name."""
    names = comparison.names
    side = min(9.0, 3.2 + 0.35 * min(len(names), 20))
    square = (side + 1.2, side)
    several = len(names) > 1
    found = {}
    if several:
        found["cosines"] = Panel(
            "cosine between changes",
            "Cosine between the changes of two models, over all tensors: 1 is the same direction, 0 a right angle, -1 "
            "the opposite.",
            lambda axes: _map(axes, comparison.cosines, names, 0.0, 0.1),
            square,
        )
    places = ["other" if layer.layer is None else layer.layer for layer in comparison.layers]
    found["layers"] = Panel(
        "norm by layer",
        "The norm of each model's change in each block"
        + ("; the last point is for all tensors outside the blocks." if "other" in places else "."),
        lambda axes: lines(
            axes,
            {name: [layer.norms[i] for layer in comparison.layers] for i, name in enumerate(names)},
            ("layer", "norm"),
            places,
        ),
    )
    curves = {each.name: each.spectrum.curve for each in comparison.models if each.spectrum and each.spectrum.curve}
    if curves:
        found["energy"] = Panel(
            "energy in the leading directions",
            "The share of a change's squared norm in its 1, 2, ... leading singular directions, in the mean of its "
            "matrices.",
            lambda axes: lines(axes, curves, ("directions", "share of the energy")),
        )
    signs, overlaps = comparison.signs, comparison.overlaps
    if signs and several:
        found["signs"] = Panel(
            "agreement of signs",
            "The share of entries changed in the same direction, among those that both models change: a half is "
            "chance.",
            lambda axes: _map(axes, signs.matrix, names, 0.5, 0.05),
            square,
        )
    if overlaps and several:
        for side_name, matrix, chance in (
            ("outputs", overlaps.outputs, overlaps.chance_outputs),
            ("inputs", overlaps.inputs, overlaps.chance_inputs),
        ):
            found[side_name] = Panel(
                f"overlap of {side_name}",
                f"The overlap of two models' leading directions of {side_name}, in the mean of the tensors: "
                f"1 is the same subspace, {chance:.2g} chance.",
                lambda axes, matrix=matrix: _map(axes, matrix, names),  # type: ignore[misc]
                square,
            )
    if comparison.intruders:
        counts = {
            name: [float(each.below(threshold)) for threshold in _THRESHOLDS]
            for name, each in zip(names, comparison.intruders, strict=True)
        }
        found["intruders"] = Panel(
            "intruder dimensions",
            f"The number of leading singular vectors (of {comparison.intruders[0].directions} in each changed matrix) "
            f"whose cosine to every singular vector of the base is below a threshold.",
            lambda axes: lines(axes, counts, ("threshold", "intruders"), _THRESHOLDS),
        )
    return found


def _map(axes: Axes, matrix: Matrix, names: Sequence[str], middle: float | None = None, least: float = 0.1) -> None:
    """Draw the pairs of different models as a heat map. Its colors start at 0, or diverge from ``middle``.

    The color range covers the values, and at least ``least``, so that noise looks pale.
    """
    off_diagonal = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    values = [value for row in off_diagonal for value in row if value is not None]
    reach = max(least, *(abs(value - (middle or 0)) for value in values)) if values else 1.0
    if middle is None:
        heatmap(axes, off_diagonal, names, (0.0, reach), "Blues")
    else:
        heatmap(axes, off_diagonal, names, (middle - reach, middle + reach))


def page(comparison: Comparison) -> Page:
    """Return a comparison as an HTML page. It needs matplotlib (the extra ``report``)."""
    figures = {name: (draw_svg(panel), panel.caption) for name, panel in panels(comparison).items()}
    names = comparison.names
    out = Page(f"Comparison: {_title(comparison)}", "The changes of each model from its base, and their agreement.")
    out.facts({"models": len(names), "base": comparison.base, "blocks": len(comparison.layers)})
    for notice in comparison.notices:
        out.note(notice)
    out.section(
        "Models",
        "The norm is over all changed tensors. The other columns are about matrices: the largest singular value, and "
        "in the mean the effective rank, the stable rank, and the directions with 90 and 99 per cent of the energy.",
    )
    out.table(*_models(comparison))
    if "energy" in figures:
        out.figure(*figures["energy"])
    if "cosines" in figures:
        out.section("Angles").figure(*figures["cosines"])
        _matrix(out, names, comparison.cosines, "Cosines")
    if len(names) > 2:
        rows: list[list[Cell]] = [[names[i], names[j], cosine] for cosine, i, j in comparison.pairs()[:_PAIRS]]
        out.table(["model", "and", "cosine"], rows, "The closest pairs")
    out.section("Sizes")
    magnitudes = comparison.magnitudes
    if magnitudes:
        out.text(
            f"In the median tensor that several models change, the largest change is {magnitudes.ratio:.3g} times the "
            f"smallest. If changes differ much in size, the largest dominate a sum."
        )
        out.facts(
            {
                "variance of norms, relative to their squared mean": magnitudes.variance,
                "the same for single columns": magnitudes.columns,
            }
        )
    out.figure(*figures["layers"])
    out.table(*_layers(comparison))
    if "signs" in figures and (signs := comparison.signs):
        out.section("Signs", f"{signs.entries:,} of {signs.total:,} entries were sampled.")
        out.figure(*figures["signs"])
        _matrix(out, names, signs.matrix, "Share of entries changed in the same direction")
    if "outputs" in figures and comparison.overlaps:
        out.section("Subspaces", f"Up to {comparison.overlaps.directions} leading directions of each change.")
        out.figure(*figures["outputs"]).figure(*figures["inputs"])
    if comparison.intruders:
        out.section(
            "Intruder dimensions",
            "Leading singular vectors of a changed matrix whose cosines to all singular vectors of the base are below "
            "a half. LoRA makes them, and they go with forgetting.",
        )
        out.figure(*figures["intruders"]).table(*_intruders(comparison))
        header, rows = _intruders_by_tensor(comparison)
        if rows:
            out.table(header, rows[:_TENSORS], f"The changes with most of the energy in intruders, of {len(rows)}")
    return out


def _matrix(out: Page, names: Sequence[str], matrix: Matrix, caption: str) -> None:
    if len(names) <= _MATRIX:
        rows: list[list[Cell]] = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        out.table(["", *names], rows, caption)


def _models(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    header = ["model", "kind", "tensors", "rank", "norm", "largest", "effective", "stable", "90 %", "99 %"]
    rows: list[list[Cell]] = []
    for each in comparison.models:
        found = each.spectrum
        spectrum: list[Cell] = [None] * 5
        if found:
            spectrum = [found.largest, found.effective, found.stable, found.energy90, found.energy99]
        rows.append([each.name, each.kind, each.tensors, each.rank_text, each.norm, *spectrum])
    return header, rows


def _layers(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    names = comparison.names if len(comparison.models) <= _MATRIX else []
    rows: list[list[Cell]] = []
    several = slice(None) if len(comparison.models) > 1 else slice(-1)
    for each in comparison.layers:
        place = "other" if each.layer is None else f"layer {each.layer}"
        rows.append([place, *each.norms[: len(names)], each.cosine][several])
    return ["", *(f"norm of {name}" for name in names), "mean cosine"][several], rows


def _intruders(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = [
        [name, each.count, each.matrices, each.touched, each.share, each.first]
        for name, each in zip(comparison.names, comparison.intruders, strict=True)
    ]
    return ["model", "intruders", "matrices", "with intruders", "share of the energy", "mean rank of the first"], rows


def _intruders_by_tensor(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Return the changes with intruders, the largest share of energy in intruders first."""
    found = [
        (each, name, tensor)
        for name, model in zip(comparison.names, comparison.intruders, strict=True)
        for tensor, each in model.by_tensor.items()
        if each.which
    ]
    rows: list[list[Cell]] = []
    for each, name, tensor in sorted(found, key=lambda one: -one[0].share):
        values = ", ".join(f"{each.values[place]:.3g}" for place in each.which)
        rows.append([name, tensor, len(each.which), each.first, each.share, values])
    return ["model", "tensor", "intruders", "rank of the first", "share of the energy", "singular values"], rows
