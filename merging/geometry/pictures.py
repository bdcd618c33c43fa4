"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.geometry.comparison import Agreement, Comparison, Matrix
from merging.report.drawing import Panel, heatmap, lines, save

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


def _square(comparison: Comparison) -> tuple[float, float]:
    """Return the size of a heat map of all models, in inches."""
    side = min(9.0, 3.2 + 0.35 * min(len(comparison.models), 20))
    return side + 1.2, side


def _cosines(comparison: Comparison) -> Panel:
    return Panel(
        "cosine between changes",
        "Cosine between the changes of two models, over all tensors: 1 is the same direction, 0 a right angle, -1 the "
        "opposite.",
        lambda axes: _map(axes, comparison.cosines, comparison.names, 0.0, 0.1),
        _square(comparison),
    )


def _layers(comparison: Comparison) -> Panel:
    places = ["other" if layer.layer is None else layer.layer for layer in comparison.layers]
    norms = {name: [layer.norms[i] for layer in comparison.layers] for i, name in enumerate(comparison.names)}
    rest = "; the last point is for all tensors outside the blocks." if "other" in places else "."
    return Panel(
        "norm by layer",
        f"The norm of each model's change in each block{rest}",
        lambda axes: lines(axes, norms, ("layer", "norm"), places),
    )


def _energy(comparison: Comparison) -> Panel:
    curves = {each.name: each.spectrum.curve for each in comparison.models if each.spectrum and each.spectrum.curve}
    return Panel(
        "energy in the leading directions",
        "The share of a change's squared norm in its 1, 2, ... leading singular directions, in the mean of its "
        "matrices.",
        lambda axes: lines(axes, curves, ("directions", "share of the energy")),
    )


def _signs(comparison: Comparison, signs: Agreement) -> Panel:
    return Panel(
        "agreement of signs",
        "The share of entries changed in the same direction, among those that both models change: a half is chance.",
        lambda axes: _map(axes, signs.matrix, comparison.names, 0.5, 0.05),
        _square(comparison),
    )


def _overlap(comparison: Comparison, side: str, matrix: Matrix, chance: float) -> Panel:
    return Panel(
        f"overlap of {side}",
        f"The overlap of two models' leading directions of {side}, in the mean of the tensors: 1 is the same subspace, "
        f"{chance:.2g} chance.",
        lambda axes: _map(axes, matrix, comparison.names),
        _square(comparison),
    )


def _intruders(comparison: Comparison) -> Panel:
    counts = {
        name: [float(each.below(threshold)) for threshold in _THRESHOLDS]
        for name, each in zip(comparison.names, comparison.intruders, strict=True)
    }
    return Panel(
        "intruder dimensions",
        f"The number of leading singular vectors (of {comparison.intruders[0].directions} in each changed matrix) "
        f"whose cosine to every singular vector of the base is below a threshold.",
        lambda axes: lines(axes, counts, ("threshold", "intruders"), _THRESHOLDS),
    )


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
