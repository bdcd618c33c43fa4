"""The commands that tell what a store holds, and how it came to that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import Placed, reported
from ..output import echo, echo_json
from .options import as_json_option, debug_option, store_argument

if TYPE_CHECKING:
    from merging.continual.manifest import StepRecord

__all__ = ["log_command", "plot_command", "status_command", "told"]


@click.command(name="status")
@store_argument
@click.option("--spectrum", is_flag=True, help="also how the merge is spread over layers and directions; reads it all")
@as_json_option
@debug_option
def status_command(store: str, spectrum: bool, as_json: bool, debug: bool) -> None:
    """What the store holds, and what each model brought.

    norm: of the model's change. kept: the share of it that was added. cosine: between the change and the merge then.
    rank: of what is held as factors. merge: the norm of what is held then, before it is multiplied for an export.
    """
    with reported(debug):
        from merging.continual import ContinualStore

        facts = ContinualStore(store).status(spectrum=spectrum)
    if as_json:
        echo_json(facts)
        return
    echo(f"{store}: {len(facts['steps'])} models by {facts['method']}, on {facts['base']}")
    for line in facts["holds"]:
        echo(f"  {line}")
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


@click.command(name="log")
@store_argument
@as_json_option
@debug_option
def log_command(store: str, as_json: bool, debug: bool) -> None:
    """The history: every step, the newest first."""
    with reported(debug):
        from merging.continual import ContinualStore

        steps = ContinualStore(store).log()
    if as_json:
        echo_json([step.model_dump() for step in steps])
        return
    for step in steps:
        echo(f"step {step.number}  {step.time}")
        echo(f"  {step.source} ({step.kind}, sha256 {step.sha256[:16]})")
        echo(f"  {told(step)}")
        for notice in step.notices:
            echo(f"  note: {notice}")


def told(step: StepRecord) -> str:
    rank = f", rank {step.rank}" if step.rank else ""
    lost = f", {step.discarded:.1%} of a tensor's energy discarded at worst" if step.discarded > 5e-4 else ""
    return f"norm {step.norm:.4g}, kept {step.kept:.1%}, cosine {step.cosine:+.3f}, merge {step.merged:.4g}{rank}{lost}"


@click.command(name="plot")
@store_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="a .png, .svg or .pdf")
@debug_option
def plot_command(store: str, output: str, debug: bool) -> None:
    """Draw norms, kept shares, cosines and ranks over the steps (needs matplotlib)."""
    with reported(debug, Placed(output)):
        from merging.continual import ContinualStore

        ContinualStore(store).plot(output)
    echo(output)
