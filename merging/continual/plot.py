"""Plots of a store over its steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from merging.continual.folder import refuse_within
from merging.errors import InputError, OptionError
from merging.report.page import check_place, write_whole

if TYPE_CHECKING:
    from merging.continual.view import StoreView

__all__ = ["plot"]


def plot(store: StoreView, output: str | Path, overwrite: bool = True) -> None:
    """Draw norms, kept shares, cosines and ranks over the steps of a store, as PNG, SVG or PDF by the name's ending.

    Without ``overwrite`` a file that exists is refused. Needs matplotlib, the extra ``report``. Raises
    :class:`~merging.errors.MergingError`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("plots need matplotlib: pip install 'merging[report]'") from None
    steps, output = store.manifest().steps, Path(output)
    if not steps:
        raise InputError(f"{store.path}: holds no model yet: add one first")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{output}: a plot is a .png, .svg or .pdf")
    check_place(output, overwrite)
    refuse_within(output)
    noun = "model" if len(steps) == 1 else "models"
    numbers = [step.number for step in steps]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    curves: dict[str, dict[str, list[float]]] = {
        "norms": {"change": [step.norm for step in steps], "held": [step.merged for step in steps]},
        "share of the change that is kept": {"kept": [step.kept for step in steps]},
        "cosine of the change to the merge": {"cosine": [step.cosine for step in steps]},
        "rank of what is held": {"rank": [float(step.rank) for step in steps]},
    }
    for panel, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, curves.items(), strict=True):
        for label, values in lines.items():
            panel.plot(numbers, values, marker="o", markersize=3, label=label)
        panel.set_title(title)
        panel.set_ylim(bottom=min(0.0, *(value for values in lines.values() for value in values)) * 1.1)
        if len(lines) > 1:
            panel.legend()
    figure.supxlabel("step")
    figure.suptitle(f"{store.path.name}: {len(steps)} {noun} by {store.method.chain}")
    content = io.BytesIO()
    figure.savefig(content, format=output.suffix[1:])
    write_whole(output, content.getvalue(), overwrite)
