"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from merging.geometry.comparison import Agreement, Comparison, Matrix
from merging.report.charts import BANDS, FEW, Scale, count_along, heatmap, heatmap_size, lines, lines_size
from merging.report.drawing import Panel, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["panels", "plot", "title"]

_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds of the cosine below which singular vectors are intruders: the range in their paper."""


def plot(comparison: Comparison, output: str | Path, overwrite: bool = True) -> None:
    """Draw a comparison into one picture. It needs matplotlib (the extra ``report``).

    Args:
        comparison: The comparison.
        output: The file to write: PNG, SVG or PDF by its suffix.
        overwrite: Whether a file that exists is replaced.

    Raises:
        merging.errors.MergingError: Without matplotlib, for another suffix, and if the file cannot be written.
    """
    save(list(panels(comparison).values()), output, title(comparison), overwrite)


def title(comparison: Comparison) -> str:
    """Return the models' names, or their number."""
    names = comparison.names
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} models"


def panels(comparison: Comparison) -> dict[str, Panel]:
    """Return the panels that the comparison has values for, by name."""
    several = len(comparison.models) > 1
    found = {}
    if several:
        found["cosines"] = _cosines(comparison)
    found["layers"] = _layers(comparison)
    if any(each.spectrum and each.spectrum.curve for each in comparison.models):
        found["energy"] = _energy(comparison)
    if comparison.signs and several:
        found["signs"] = _signs(comparison, comparison.signs)
    if comparison.overlaps and several:
        overlaps = comparison.overlaps
        found["outputs"] = _overlap(comparison, "outputs", overlaps.outputs, overlaps.chance_outputs)
        found["inputs"] = _overlap(comparison, "inputs", overlaps.inputs, overlaps.chance_inputs)
    if comparison.intruders:
        found["intruders"] = _intruders(comparison)
    return found


def _map(title: str, caption: str, comparison: Comparison, matrix: Matrix, scale: Scale) -> Panel:
    """Return a heat map of the pairs of different models."""
    pairs = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    names = comparison.names
    return Panel(title, caption, lambda axes: heatmap(axes, pairs, names, scale), heatmap_size(names))


def _cosines(comparison: Comparison) -> Panel:
    return _map(
        "cosine between changes",
        "Cosine between the changes of two models, over all tensors: 1 (dark red) is the same direction, 0 (pale) a "
        "right angle, -1 (dark blue) the opposite. The scale is the same in every picture.",
        comparison,
        comparison.cosines,
        Scale("cosine", -1, 1),
    )


def _layers(comparison: Comparison) -> Panel:
    blocks = [layer for layer in comparison.layers if layer.layer is not None]
    rest = next((layer.norms for layer in comparison.layers if layer.layer is None), None)
    norms = {name: [layer.norms[i] for layer in blocks] for i, name in enumerate(comparison.names)}
    apart = None if rest is None else ("other", rest)
    outside = "" if rest is None else ' Apart on the right, "other" is for all tensors outside the blocks.'
    return Panel(
        "norm by layer",
        f"The Frobenius norm of each model's change in each block, from the first to the last; higher is a larger "
        f"change.{outside}{_bands(norms)}",
        lambda axes: lines(
            axes,
            norms,
            ("block", "norm of the change"),
            places=[layer.layer for layer in blocks if layer.layer is not None],
            apart=apart,
        ),
        lines_size(comparison.names),
    )


def _energy(comparison: Comparison) -> Panel:
    curves = {each.name: each.spectrum.curve for each in comparison.models if each.spectrum and each.spectrum.curve}

    def draw(axes: Axes) -> None:
        lines(axes, curves, ("leading directions (count)", "share of the squared norm"))
        axes.set_ylim(0, 1.03)

    return Panel(
        "energy in the leading directions",
        "The share of a change's squared norm in its 1, 2, ... leading singular directions, in the mean of its "
        f"matrices. A line that is near 1 early is a change of low rank.{_bands(curves)}",
        draw,
        lines_size(comparison.names),
    )


def _signs(comparison: Comparison, signs: Agreement) -> Panel:
    return _map(
        "agreement of signs",
        "The share of entries changed in the same direction, among those that both models change: 1 (dark red) is "
        "all, 0 (dark blue) none, and a half (pale) is chance.",
        comparison,
        signs.matrix,
        Scale("share of the same sign", 0, 1, chance=0.5),
    )


def _overlap(comparison: Comparison, side: str, matrix: Matrix, chance: float) -> Panel:
    return _map(
        f"overlap of {side}",
        f"The overlap of two models' leading directions of {side}, in the mean of the tensors: 1 (dark) is the same "
        f"subspace, 0 (white) no common direction. Chance, {chance:.2g}, is marked on the scale.",
        comparison,
        matrix,
        Scale("overlap", 0, 1, "Blues", chance=chance),
    )


def _intruders(comparison: Comparison) -> Panel:
    counts = {
        name: [float(each.below(threshold)) for threshold in _THRESHOLDS]
        for name, each in zip(comparison.names, comparison.intruders, strict=True)
    }

    def draw(axes: Axes) -> None:
        lines(axes, counts, ("threshold (cosine)", "intruder dimensions (count)"), places=_THRESHOLDS)
        axes.set_xticks(_THRESHOLDS)
        count_along(axes, "y")

    return Panel(
        "intruder dimensions",
        f"The number of leading singular vectors (of {comparison.intruders[0].directions} in each changed matrix) "
        f"whose cosine to every singular vector of the base is below a threshold. The usual threshold is a half; lower "
        f"lines go with less forgetting.{_bands(counts)}",
        draw,
        lines_size(comparison.names),
    )


def _bands(curves: Mapping[str, object]) -> str:
    """Return the sentence on bands, where they are drawn."""
    return f" {BANDS}" if len(curves) > FEW else ""
