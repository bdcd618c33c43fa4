"""``merge inspect``: what is this file?"""

from __future__ import annotations

import json
from typing import Any

import click

from .errors import reported
from .output import size_text

__all__ = ["inspect_command"]


@click.command(name="inspect")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--values", is_flag=True, help="read all values too, and name tensors with NaN or infinities")
@click.option("--json", "as_json", is_flag=True, help="print as JSON, a list with one entry a path")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def inspect_command(paths: tuple[str, ...], values: bool, as_json: bool, debug: bool) -> None:
    """Tell what a model or adapter is: kind, base, rank, modules, types, layers, size. Headers alone are read."""
    with reported(debug):
        from merging.inspect import inspect

        found = [inspect(path, values=values) for path in paths]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for facts in found:
        click.echo(facts.pop("path"))
        for name, value in facts.items():
            if value not in (None, [], {}, "") or name in ("nonfinite", "needs_base"):
                click.echo(
                    f"  {name.replace('_', ' '):13} {size_text(value) if name.endswith('bytes') else _text(value)}"
                )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
