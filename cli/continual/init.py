"""``merge continual init``: an empty store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..errors import handle_errors
from ..fields import FieldsCommand, chain_options
from ..options import debug_option, json_option
from ..output import echo, echo_json, show_progress
from ..types import METHOD, MODEL
from .options import StoreStatus, store_argument

__all__ = ["init_command"]


def method_options(typed: Mapping[str, Any]) -> list[click.Option]:
    """Return the options of the chosen method's chain."""
    return chain_options(typed.get("method") or "opcm")


@click.command(cls=FieldsCommand, fields=method_options, name="init", short_help="make an empty store")
@store_argument
@click.option("--base", type=MODEL, required=True, help="the model that all others were trained from")
@click.option(
    "-m", "--method", type=METHOD, default="opcm", show_default=True, help="how it grows; its options join these"
)
@click.option("--max-rank", type=int, help="most rank of the factors in the store  [default: while smaller]")
@json_option
@debug_option
def init_command(
    store: str, base: str, method: str, max_rank: int | None, as_json: bool, debug: bool, fields: dict[str, Any]
) -> None:
    """Make an empty store.

    Methods: opcm, task_arithmetic, linear (a running mean), magmax, ties, and lines around a sum or mean. The base is a
    folder, a file, or a name on the Hub. With ties, the density counts in the tensors that each model changes. Adapters
    with different targets therefore keep another share than in one merge, as a store cannot know the union.
    """
    with handle_errors(debug, StoreStatus(store)):
        from merging.continual import ContinualStore

        parameters = {name.replace("__", "."): value for name, value in fields.items()}
        with show_progress(None) as report:
            made = ContinualStore.create(
                store, base=base, method=method, max_rank=max_rank, progress=report, **parameters
            )
        chain = made.method.chain
    if as_json:
        echo_json({"store": store, "method": chain, "base": base}, indent=None)
    else:
        echo(f"{store}: grows by {chain}")
