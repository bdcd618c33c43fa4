"""``merge route``: prototypes by which a server chooses among adapters, token by token."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .options import debug_option, different_bases_option, json_option, overwrite_option
from .output import echo, echo_json, echo_notices, plural
from .types import MODEL

__all__ = ["route_command"]


@click.command(name="route", short_help="export prototypes by which a server chooses among adapters")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="ADAPTER...")
@click.option("-o", "--output", required=True, type=click.Path(), help="a .safetensors file")
@click.option(
    "--kind",
    type=click.Choice(["arrow", "spectr"]),
    default="arrow",
    show_default=True,
    help="prototypes of each change",
)
@click.option("--normalize", is_flag=True, help="spectr: do not let larger changes win")
@different_bases_option
@overwrite_option
@json_option
@debug_option
def route_command(models: tuple[str, ...], output: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Export the prototypes by which a server routes tokens among adapters, instead of merging them.

    arrow: the leading right singular vector of each change, scored by |v . x|. spectr: all right singular vectors times
    their singular values, scored by |P x|, the length of the change's output for x.
    """
    with handle_errors(debug, OutputStatus(output)):
        from merging.api.prototypes import export_prototypes

        done = export_prototypes(models, output, **options)
    echo_notices(done.notices)
    if as_json:
        echo_json({"path": str(done.path), "adapters": done.adapters, "modules": done.modules}, indent=None)
    else:
        echo(f"{done.path}: prototypes of {plural(len(done.adapters), 'adapter')} for {plural(done.modules, 'module')}")
