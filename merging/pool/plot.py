"""A picture of a pool."""

from __future__ import annotations

import io
from pathlib import Path

from merging.errors import InputError, OptionError
from merging.pool.entry import VERDICTS
from merging.pool.pool import Pool
from merging.report.page import check_place, write_whole

__all__ = ["plot"]


def plot(pool: Pool, output: str | Path, overwrite: bool = True) -> None:
    """Draw verdicts, ranks and norms relative to the base. It needs matplotlib (the extra ``report``).

    Args:
        pool: The pool.
        output: The file to write: PNG, SVG or PDF by its suffix.
        overwrite: Whether a file that exists is replaced.

    Raises:
        merging.errors.MergingError: Without matplotlib, for an empty pool, and for another suffix.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("plots need matplotlib: pip install 'merging[report]'") from None
    entries, output = pool.index.entries(), Path(output)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{output}: a plot is a .png, .svg or .pdf")
    check_place(output, overwrite)
    if not entries:
        raise InputError(f"{pool.path}: holds no adapter yet: build it first")
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    verdicts, ranks, norms = figure.subplots(1, 3)
    counted = pool.verdicts()
    verdicts.bar(range(len(counted)), list(counted.values()))
    verdicts.set_xticks(range(len(counted)), list(counted))
    verdicts.set_title(f"{len(entries)} adapters by verdict")
    ordered = sorted({entry.rank for entry in entries if entry.rank})
    ranks.bar(range(len(ordered)), [sum(entry.rank == rank for entry in entries) for rank in ordered])
    ranks.set_xticks(range(len(ordered)), [str(rank) for rank in ordered])
    ranks.set_title("by rank")
    for verdict in VERDICTS:
        sizes = [entry.figures.get("relative_norm") for entry in entries if entry.verdict == verdict]
        known = sorted(size for size in sizes if size)
        norms.plot(known, [(step + 1) / len(known) for step in range(len(known))], marker=".", label=verdict)
    norms.set_xscale("log")
    norms.set_xlabel("norm relative to the changed tensors")
    norms.set_ylabel("share of adapters below")
    norms.legend()
    content = io.BytesIO()
    figure.savefig(content, format=output.suffix[1:])
    write_whole(output, content.getvalue(), overwrite)
