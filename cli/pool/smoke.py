"""``merge pool smoke``: run the base with every adapter of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import handle_errors
from ..options import debug_option, device_option, evaluation_options, json_option, pop_engine
from .options import PoolStatus, pool_argument
from .verdicts import echo_entry, echo_verdicts

__all__ = ["smoke_command"]


@click.command(name="smoke", short_help="run the base with every adapter")
@pool_argument
@click.option("--texts", type=click.Path(), help="plain texts of your own, one a line  [default: 24 English ones]")
@click.option("--destroyed", type=float, help="times the base's perplexity that are too many  [default: as before; 3]")
@click.option(
    "--collapsed", type=float, help="share of the features' spread that is too little  [default: as before; 0.1]"
)
@click.option("--unchanged", type=float, help="change of the outputs that is none  [default: as before; 0.001]")
@device_option
@evaluation_options
@click.option("--again", is_flag=True, help="also adapters that were tested before")
@json_option
@debug_option
def smoke_command(
    pool: Path, texts: str | None, device: str, again: bool, as_json: bool, debug: bool, **others: Any
) -> None:
    """Run the base with every adapter over a few texts, and quarantine any that destroy it or change nothing.

    A language model is destroyed if plain text has over 3 times its perplexity. Another model is destroyed if all texts
    look nearly alike to it. New limits also judge adapters that were tested before, by the figures in the pool. A test
    that was interrupted goes on when it is started again.
    """
    with handle_errors(debug, PoolStatus(pool)):
        from dataclasses import replace

        from merging.pool import Pool
        from merging.pool.smoke import read_texts
        from merging.pool.smoke_run import smoke_limits

        chosen, opened = read_texts(texts) if texts else None, Pool(pool)
        engine = pop_engine(others)
        given = {name: value for name, value in others.items() if value is not None}
        changed = replace(smoke_limits(opened.index), **given) if given else None
        verdicts = opened.smoke(chosen, limits=changed, device=device, again=again, engine=engine, on_event=echo_entry)
    echo_verdicts(pool, verdicts, as_json)
