"""``merge tokens``: the tokenizer of one model transplanted onto another."""

from __future__ import annotations

from typing import Any

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .options import dtype_option
from .types import MODEL

__all__ = ["tokens_command"]


@click.command(name="tokens", short_help="give a model the tokenizer of another")
@click.argument("target", type=MODEL)
@click.argument("donor", type=MODEL)
@click.option(
    "--method",
    type=click.Choice(["omp", "common_interpolation", "subword", "mean", "zero"]),
    default="omp",
    show_default=True,
    help="rows of tokens that the target lacks: sums of shared tokens (orthogonal matching pursuit), means of the "
    "nearest shared tokens, of the token's own pieces, or of all rows, or zeros",
)
@click.option("-k", type=click.IntRange(1), default=64, show_default=True, help="shared tokens that make up a row")
@click.option("--pad-to-multiple-of", type=click.IntRange(1), help="make the number of rows a multiple of this")
@dtype_option
@execution_options
def tokens_command(
    target: str,
    donor: str,
    method: str,
    k: int,
    pad_to_multiple_of: int | None,
    dtype: str | None,
    execution: Execution,
) -> None:
    """Write TARGET with the tokenizer of DONOR: a draft model for DONOR, or a model of another language family.

    \b
    merge tokens small/ large/ -o draft/
    merge tokens --method subword TARGET DONOR -o OUT

    Tokens that both have keep TARGET's rows. The rows of others are computed from tokens that both have. The report
    says how many tokens were shared and approximated, and how well: the relative errors are of DONOR's own rows.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.plan.recipe_values import make_recipe

        settings: dict[str, Any] = {"source": donor, "approximate": method, "k": k}
        if pad_to_multiple_of is not None:
            settings["pad_to_multiple_of"] = pad_to_multiple_of
        values = {"models": [target], "method": "passthrough", "tokenizer": settings, "as": "model"}
        execute(make_recipe(values | ({"dtype": dtype} if dtype else {}), "merge tokens"), execution, status)
