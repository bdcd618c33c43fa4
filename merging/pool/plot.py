"""A picture of a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import InputError
from merging.pool.entry import VERDICTS, Entry
from merging.pool.pool import Pool
from merging.report.charts import bars, legend
from merging.report.drawing import Panel, check_drawing, save
from merging.report.style import BAD, DOUBTFUL, GOOD, MENDED, Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MARKS", "panels", "plot"]

MARKS: dict[str, Mark] = {"ok": GOOD, "repaired": MENDED, "quarantined": DOUBTFUL, "rejected": BAD}
"""How verdicts are drawn: ok is green, repaired blue, quarantined orange, and rejected dark red."""

_RANKS = 10
"""The most ranks with bars of their own; of more, ranges are drawn."""


def plot(pool: Pool, output: str | Path, overwrite: bool = True) -> None:
    """Draw verdicts, ranks and norms relative to the base. It needs matplotlib (the extra ``report``).

    Args:
        pool: The pool.
        output: The file to write: PNG, SVG or PDF by its suffix.
        overwrite: Whether a file that exists is replaced.

    Raises:
        merging.errors.MergingError: Without matplotlib, for an empty pool, and for another suffix.
    """
    check_drawing(output, overwrite)
    entries = pool.index.entries()
    if not entries:
        raise InputError(f"{pool.path}: holds no adapter yet: build it first")
    adapters = "1 adapter" if len(entries) == 1 else f"{len(entries):,} adapters"
    save(panels(entries), output, f"{pool.path.name}: {adapters}", overwrite)


def panels(entries: Sequence[Entry]) -> list[Panel]:
    """Return the panels that there are values for."""
    verdicts = Counter(entry.verdict for entry in entries)
    found = [
        Panel(
            "adapters by verdict",
            "Merges may use adapters that are ok or repaired. Quarantined ones wait for a person; rejected ones are "
            "not kept.",
            lambda axes: bars(
                axes, {each: verdicts[each] for each in VERDICTS}, ("adapters (count)", "verdict"), MARKS
            ),
        )
    ]
    ranks = _by_rank([entry.rank for entry in entries if entry.rank])
    if ranks:
        found.append(
            Panel(
                "adapters by rank",
                "The largest rank of each adapter. Adapters without a known rank are left out.",
                lambda axes: bars(axes, ranks, ("adapters (count)", "rank")),
            )
        )
    norms: dict[str, list[float]] = {
        verdict: sorted(
            norm for entry in entries if entry.verdict == verdict and (norm := entry.figures.get("relative_norm"))
        )
        for verdict in VERDICTS
    }
    if any(norms.values()):
        found.append(
            Panel(
                "norms relative to the base",
                "For each verdict, the share of its adapters whose change is at most this large, relative to the "
                "tensors that it changes. A line on the right is of large changes.",
                lambda axes: _draw_norms(axes, norms),
            )
        )
    return found


def _by_rank(ranks: Sequence[int]) -> dict[str, int]:
    """Return the number of adapters by rank, or by ranges of ranks up to powers of two."""
    counted = Counter(ranks)
    if len(counted) <= _RANKS:
        return {str(rank): counted[rank] for rank in sorted(counted)}
    powers = Counter((rank - 1).bit_length() for rank in ranks)
    return {
        f"{2 ** (power - 1) + 1} to {2**power}" if power > 1 else str(2**power): powers[power]
        for power in range(min(powers), max(powers) + 1)
    }


def _draw_norms(axes: Axes, norms: dict[str, list[float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    known = [norm for values in norms.values() for norm in values]
    for verdict, values in norms.items():
        if values:
            mark = MARKS[verdict]
            shares = [100 * step / len(values) for step in range(len(values) + 1)]
            style = {"color": mark.color, "linestyle": mark.dash, "label": verdict}
            axes.step(
                [values[0], *values],
                shares,
                where="post",
                marker=mark.marker,
                markevery=_space_markers(values),
                **style,
            )
    axes.set_xscale("log")
    axes.set_xlim(min(known) / 1.6, max(known) * 1.6)
    wide = max(known) > 30 * min(known)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=7))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="norm of the change / norm of the changed tensors", ylabel="adapters up to this norm (%)")
    axes.set_ylim(0, 104)
    legend(axes)


def _space_markers(values: Sequence[float]) -> int:
    """Return the distance of markers, so that about a dozen are drawn."""
    return max(1, len(values) // 12)
