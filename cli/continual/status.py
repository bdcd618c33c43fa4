"""``merge continual status``: the models and figures of a store."""

from __future__ import annotations

import click

from ..errors import handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json, format_size, plural
from .options import store_argument

__all__ = ["status_command"]


@click.command(name="status", short_help="show the models and figures of a store")
@store_argument
@click.option("--spectrum", is_flag=True, help="also how the merge is spread over layers and directions; reads it all")
@json_option
@debug_option
def status_command(store: str, spectrum: bool, as_json: bool, debug: bool) -> None:
    """Show the models of a store and the figures of each step.

    norm: the norm of the model's change. kept: the share of it that was added. cosine: between the change and the merge
    at that step. rank: of the factors. merge: the norm of the merged changes, before an export multiplies them.
    """
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
        echo(f"  exported times {facts['scale']:.4g}")
        echo("")
        echo(f"{'step':>4}  {'norm':>9}  {'kept':>6}  {'cosine':>6}  {'rank':>4}  {'merge':>9}  model")
    for step in facts["steps"]:
        echo(
            f"{step['number']:>4}  {step['norm']:>9.4g}  {step['kept']:>6.1%}  {step['cosine']:>+6.3f}  "
            f"{step['rank'] or '-':>4}  {step['merged']:>9.4g}  {step['source']}"
        )
    for layer in facts.get("layers", ()):
        place = "outside" if layer["layer"] is None else f"layer {layer['layer']}"
        echo(
            f"{place:>10}: norm {layer['norm']:.4g}, leading directions {layer['leading']:.1%}, "
            f"stable rank {layer['stable_rank']:.1f}"
        )
    for each in facts["refused"]:
        echo(f"refused: {each['source']}: {each['reason']}")


def _describe_gc(store: str, disk: dict[str, int]) -> str:
    """Return how room is made, if there are states that gc would remove."""
    if not disk["freed_by_gc"]:
        return ""
    freed = format_size(disk["freed_by_gc"])
    return f"; merge continual gc {store} --keep 1 frees {freed}, and add --keep N keeps the last N"
