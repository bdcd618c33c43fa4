"""``merge compare``: the agreement of models in their changes."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import click

from .errors import OutputStatus, handle_errors
from .options import (
    changes_base_option,
    changes_options,
    debug_option,
    json_option,
    overwrite_option,
)
from .output import echo, echo_json, echo_notices, echo_text, show_progress, terminal_width
from .tables import echo_paragraph, echo_table
from .types import MODEL

if TYPE_CHECKING:
    from merging.geometry import Comparison

__all__ = ["compare_command"]

_MATRIX = 12
"""Models up to which a matrix is printed; of more, the closest pairs are."""

_PAIRS = 20


@click.command(name="compare", short_help="compare the changes of models")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@changes_base_option
@click.option(
    "--signs",
    type=click.Choice(["sample", "all", "none"]),
    default="sample",
    show_default=True,
    help="how often signs agree: over a sample of every tensor, over all entries, or not at all",
)
@click.option(
    "--intruders", is_flag=True, help="intruder dimensions against --base, each of whose matrices is decomposed"
)
@click.option("--full-spectra", is_flag=True, help="decompose large full changes too: seconds to minutes each")
@click.option("--plot", type=click.Path(), help="draw it: a .png, .svg or .pdf (needs matplotlib)")
@click.option("--html", type=click.Path(), help="write it as one page that needs nothing else (needs matplotlib)")
@overwrite_option
@changes_options
@json_option
@debug_option
def compare_command(
    models: tuple[str, ...],
    signs: Literal["sample", "all", "none"],
    plot: str | None,
    html: str | None,
    overwrite: bool,
    device: str,
    max_memory: int | None,
    progress: str | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compare the changes of models: angles, sizes, ranks, signs, subspaces; and intruder dimensions if asked for.

    Of adapters only the factors are read, whatever the size of the model.
    """
    with handle_errors(debug, OutputStatus(plot, html)):
        from merging.geometry import compare
        from merging.geometry.alignment import MEMORY

        if plot or html:
            from merging.report.drawing import check_drawing
            from merging.report.page import check_page

            check_drawing(plot, overwrite)
            check_page(html, overwrite)
        with show_progress(progress, "comparing") as report:
            found = compare(
                models,
                signs=None if signs == "none" else signs,
                max_memory=max_memory or MEMORY,
                device=device,
                progress=report,
                **options,
            )
        if plot or html:
            from merging.geometry.page import page
            from merging.geometry.pictures import plot as draw

            if plot:
                draw(found, plot, overwrite)
            if html:
                page(found).write(html, overwrite)
    if as_json:
        echo_json(found.to_dict())
        return
    _echo(found)
    for written in filter(None, (plot, html)):
        echo(written)


def _echo(found: Comparison) -> None:
    echo_notices(found.notices)
    _echo_models(found)
    names = found.names
    if len(names) > 1:
        _echo_pairs("cosine", names, found.cosines, "+.3f")
    if found.magnitudes:
        sizes = found.magnitudes
        columns = "" if sizes.columns is None else f", of single columns {sizes.columns:.3g}"
        echo("")
        echo_paragraph(
            f"magnitudes: the largest change of a tensor is {sizes.ratio:.3g} times the smallest, in the median of "
            f"{sizes.tensors}; variance over squared mean: of norms {sizes.variance:.3g}{columns}"
        )
    _echo_layers(found)
    if found.signs and len(names) > 1:
        signs = found.signs
        title = f"signs that agree, {signs.entries:,} of {signs.total:,} entries; 0.5 is chance"
        _echo_pairs(title, names, signs.matrix, ".3f")
    if found.overlaps and len(names) > 1:
        overlaps = found.overlaps
        for side, matrix, chance in (
            ("outputs", overlaps.outputs, overlaps.chance_outputs),
            ("inputs", overlaps.inputs, overlaps.chance_inputs),
        ):
            title = f"overlap of {side}, {overlaps.directions} leading directions at most; {chance:.3f} is chance"
            _echo_pairs(title, names, matrix, ".3f")
    if found.intruders:
        _echo_intruders(found)


def _echo_models(found: Comparison) -> None:
    header = ["", "kind", "tensors", "rank", "norm", "largest", "effective", "stable", "90 %", "99 %"]
    rows = []
    for each in found.models:
        cells = ["-"] * 5
        if spectrum := each.spectrum:
            ranks = spectrum.effective, spectrum.stable, spectrum.energy90, spectrum.energy99
            cells = [f"{value:.3g}" for value in (spectrum.largest, *ranks)]
        rows.append([each.name, each.kind, str(each.tensors), each.rank_text, f"{each.norm:.4g}", *cells])
    _table(header, *rows)
    echo_paragraph(
        "largest: singular value; effective, stable: ranks; 90 %, 99 %: directions with that much of the energy"
    )


def _echo_pairs(title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], form: str) -> None:
    """Print a matrix over models, or its largest pairs if there are many."""

    def text(value: float | None) -> str:
        return "-" if value is None else format(value, form)

    echo("")
    echo_paragraph(title)
    if len(names) <= _MATRIX:
        _table(["", *names], *([name, *map(text, row)] for name, row in zip(names, matrix, strict=True)))
        return
    rows = range(len(names))
    pairs = [(value, i, j) for i in rows for j in rows[i + 1 :] if (value := matrix[i][j]) is not None]
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0])[:_PAIRS]:
        echo(f"  {text(value)}  {names[i]}  {names[j]}")
    echo(f"  the largest {min(_PAIRS, len(pairs))} of {len(pairs):,} pairs")


def _echo_layers(found: Comparison) -> None:
    names = found.names if len(found.names) <= _MATRIX else []
    echo_text("\nnorm by layer" if names else "\nmean cosine by layer")
    rows = [["", *names, "mean cosine"]]
    for each in found.layers:
        place = "other" if each.layer is None else f"layer {each.layer}"
        cosine = "-" if each.cosine is None else f"{each.cosine:+.3f}"
        rows.append([place, *(f"{norm:.4g}" for norm in each.norms[: len(names)]), cosine])
    _table(*(rows if len(found.names) > 1 else [row[:-1] for row in rows]))


def _echo_intruders(found: Comparison) -> None:
    most = found.intruders[0].directions
    echo("")
    echo_paragraph(f"intruder dimensions among the {most} leading singular vectors of each matrix")
    header = ["", "intruders", "matrices", "with intruders", "energy", "first at"]
    rows = []
    for name, each in zip(found.names, found.intruders, strict=True):
        first = "-" if each.first is None else f"{each.first:.1f}"
        rows.append([name, str(each.count), str(each.matrices), str(each.touched), f"{each.share:.2%}", first])
    _table(header, *rows)


def _table(*rows: Sequence[str]) -> None:
    """Print rows, the header first, in columns flush right; columns that do not fit follow, behind the first again."""
    first, *columns = zip(*rows, strict=True)
    while columns:
        count = _fitting(first, columns)
        shown = [first, *columns[:count]]
        echo_table([("", *row) for row in zip(*shown, strict=True)], flush_right=range(2, len(shown) + 1))
        columns = columns[count:]


def _fitting(first: Sequence[str], columns: Sequence[Sequence[str]]) -> int:
    """Return how many of the columns, at least one, fit the terminal behind the first."""
    left = (terminal_width() or inf) - len(max(first, key=len)) - 2
    for count, column in enumerate(columns):
        left -= len(max(column, key=len)) + 2
        if left < 0:
            return max(count, 1)
    return len(columns)
