"""A comparison as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merging.display.tables import Cell
from merging.geometry.comparison import Comparison, Matrix
from merging.geometry.pictures import panels, title
from merging.report.charts import LABELLED
from merging.report.drawing import draw_svg
from merging.report.page import Page

__all__ = ["page"]

_PAIRS, _TENSORS, _MATRIX = 20, 40, 24
"""The most pairs of models and tensors that are listed, and the most models of a printed matrix."""

Figures = Mapping[str, tuple[str, str]]
"""Drawings as SVG, with their captions, by name."""


def page(comparison: Comparison) -> Page:
    """Return a comparison as an HTML page. It needs matplotlib (the extra ``report``)."""
    figures = {name: (draw_svg(panel), panel.caption) for name, panel in panels(comparison).items()}
    names = comparison.names
    out = Page(f"Comparison: {title(comparison)}", "The changes of each model from its base, and their agreement.")
    out.facts({"models": len(names), "base": comparison.base, "blocks": comparison.blocks})
    for notice in comparison.notices:
        out.note(notice)
    _add_models(out, comparison, figures)
    _add_sizes(out, comparison, figures)
    if "signs" in figures and (signs := comparison.signs):
        out.section("Signs", f"{signs.entries:,} of {signs.total:,} entries were compared.")
        out.figure(*figures["signs"])
        _matrix(out, names, signs.matrix, "Share of entries changed in the same direction")
    if "outputs" in figures and comparison.overlaps:
        out.section("Subspaces", f"Up to {comparison.overlaps.directions} leading directions of each change.")
        out.figure(*figures["outputs"]).figure(*figures["inputs"])
    if comparison.intruders:
        _add_intruders(out, comparison, figures)
    return out


def _add_models(out: Page, comparison: Comparison, figures: Figures) -> None:
    names = comparison.names
    out.section(
        "Models",
        "The norm is over all changed tensors. The other columns are about matrices: the largest singular value, and "
        "in the mean the effective rank, the stable rank, and the directions with 90 and 99 per cent of the energy.",
    )
    if "energy" in figures:
        out.figure(*figures["energy"])
    out.table(*_models(comparison))
    if "cosines" in figures:
        out.section("Angles").figure(*figures["cosines"])
        _matrix(out, names, comparison.cosines, "Cosines")
    if len(names) > 2:
        rows: list[list[Cell]] = [[names[i], names[j], cosine] for cosine, i, j in comparison.pairs()[:_PAIRS]]
        out.table(["model", "and", "cosine"], rows, "The closest pairs")


def _add_sizes(out: Page, comparison: Comparison, figures: Figures) -> None:
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


def _add_intruders(out: Page, comparison: Comparison, figures: Figures) -> None:
    out.section(
        "Intruder dimensions",
        "Leading singular vectors of a changed matrix whose cosines to all singular vectors of the base are below "
        "a half. LoRA makes them, and they go with forgetting.",
    )
    out.figure(*figures["intruders"]).table(*_intruders(comparison))
    header, rows = _intruders_by_tensor(comparison)
    if rows:
        out.table(header, rows[:_TENSORS], f"The changes with most of the energy in intruders, of {len(rows)}")


def _matrix(out: Page, names: Sequence[str], matrix: Matrix, caption: str) -> None:
    if len(names) <= _MATRIX:
        rows: list[list[Cell]] = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        out.table(["", *names], rows, caption)


def _models(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    header = [
        "model",
        "kind",
        "tensors",
        "rank",
        "norm",
        "largest",
        "effective",
        "stable",
        "90\N{NO-BREAK SPACE}%",
        "99\N{NO-BREAK SPACE}%",
    ]
    rows: list[list[Cell]] = []
    numbered = len(comparison.models) > LABELLED  # as on the axes of the maps
    for number, each in enumerate(comparison.models, 1):
        found = each.spectrum
        spectrum: list[Cell] = [None] * 5
        if found:
            spectrum = [found.largest, found.effective, found.stable, found.energy90, found.energy99]
        name = f"{number}. {each.name}" if numbered else each.name
        rows.append([name, each.kind, each.tensors, each.rank_text, each.norm, *spectrum])
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
