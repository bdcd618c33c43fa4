"""``merge suggest``: a method to begin with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .errors import handle_errors
from .options import (
    changes_base_option,
    changes_options,
    debug_option,
    json_option,
)
from .output import echo, echo_json, echo_notices, show_progress
from .tables import format_legend
from .types import MODEL

if TYPE_CHECKING:
    from merging.geometry.suggestion import Suggestion

__all__ = ["suggest_command"]


@click.command(name="suggest", short_help="suggest a method and its scale, without data")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@changes_base_option
@changes_options
@json_option
@debug_option
def suggest_command(
    models: tuple[str, ...],
    base: str | None,
    device: str,
    max_memory: int | None,
    progress: str | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Suggest a method and its scale, from the sizes and directions of the models' changes.

    No example is looked at: it is where a search begins (merge search), and no proof of a better model.
    """
    with handle_errors(debug):
        from merging.geometry.alignment import MEMORY
        from merging.geometry.suggestion import suggest

        with show_progress(progress, "comparing") as report:
            found = suggest(
                models, base=base, max_memory=max_memory or MEMORY, device=device, progress=report, **options
            )
    if as_json:
        echo_json(found.to_dict())
        return
    echo_notices(found.notices)
    _echo(found, base)


def _echo(found: Suggestion, base: str | None) -> None:
    from_base = [] if base is None else ["--base", base]
    cheaper, parameters = found.cheaper
    echo(shlex.join(["merge", *_words(found.chain, found.parameters), *from_base, *found.models]))
    lines = [
        ("changes", found.changes),
        ("sizes", found.sizes),
        ("reason", found.reason),
        ("measured", found.measured),
        ("then", f"merge search --candidate {shlex.quote(found.search)}, on examples of your own"),
    ]
    if found.leave_out:
        lines.insert(0, ("leave out", f"{', '.join(found.leave_out)}: another model has the same change"))
    if cheaper not in (found.chain, "linear"):
        lines.append(("cheaper", shlex.join(_words(cheaper, parameters))))
    for line in format_legend([(f"{name}:", text) for name, text in lines]):
        echo(line)


def _words(chain: str, parameters: Mapping[str, Any]) -> list[str]:
    """Return the options of a command for a chain and its parameters."""
    words = ["--method", chain]
    for name, value in parameters.items():
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words
