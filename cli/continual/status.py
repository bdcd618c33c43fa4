"""``merge continual status``: the models and figures of a store."""

from __future__ import annotations

from typing import Any

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, echo_text, format_size, plural
from ..tables import echo_table, format_legend
from .options import store_argument
from .steps import FIGURES, REMOVED

__all__ = ["status_command"]

_HEADER = ["step", "norm", "kept", "cosine", "rank", "merge", "model"]


@click.command(name="status", short_help="show the models and figures of a store")
@store_argument
@click.option("--spectrum", is_flag=True, help="also how the merge is spread over layers and directions; reads it all")
@json_option
@debug_option
def status_command(store: str, spectrum: bool, as_json: bool, debug: bool) -> None:
    """Show the models of a store and the figures of each step, with their meanings."""
    with handle_errors(debug):
        from merging.continual import ContinualStore

        facts = ContinualStore(store).status(spectrum=spectrum)
    if as_json:
        echo_json(facts)
        return
    echo(f"{store}: {plural(len(facts['steps']), 'model')} by {facts['method']}, on {facts['base']}")
    for line in facts["holds"]:
        echo(f"  {line}")
    disk = facts["disk"]
    if disk["states"]:
        echo(
            f"  {plural(disk['states'], 'state')} on the disk, {format_size(disk['bytes'])}{_describe_gc(store, disk)}"
        )
    if facts["steps"]:
        echo(f"  an export multiplies the merged changes by {facts['scale']:.4g}")
        echo("")
        rows = [_HEADER, *map(_row, facts["steps"])]
        echo_table(rows, flush_right=range(len(_HEADER) - 1))
        removed = any(not step["restorable"] for step in facts["steps"])
        echo_text("\n".join(["", *format_legend([*FIGURES, REMOVED] if removed else FIGURES)]))
    for layer in facts.get("layers", ()):
        place = "outside" if layer["layer"] is None else f"layer {layer['layer']}"
        echo(
            f"{place:>10}: norm {layer['norm']:.4g}, leading directions {layer['leading']:.1%}, "
            f"stable rank {layer['stable_rank']:.1f}"
        )
    for each in facts["refused"]:
        echo(f"refused: {each['source']}: {each['reason']}")


def _row(step: dict[str, Any]) -> list[str]:
    """Return the figures of a step as a row of the table."""
    figures = [f"{step['norm']:.4g}", f"{step['kept']:.1%}", f"{step['cosine']:+.3f}"]
    number = f"{step['number']}{'' if step['restorable'] else '*'}"
    return [number, *figures, str(step["rank"] or "-"), f"{step['merged']:.4g}", step["source"]]


def _describe_gc(store: str, disk: dict[str, int]) -> str:
    """Return how room is made, if there are states that gc would remove."""
    if not disk["freed_by_gc"]:
        return ""
    freed = format_size(disk["freed_by_gc"])
    return f"; merge continual gc {store} --keep 1 frees {freed}, and add --keep N keeps the last N"
