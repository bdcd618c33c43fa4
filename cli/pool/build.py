"""``merge pool build``: audit adapters and keep those that are worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import handle_errors
from ..options import debug_option, evaluation_options, json_option, pop_engine
from ..output import echo, echo_json, plural
from ..types import MODEL
from .options import PoolStatus, license_option, owner_cap_option, pool_argument
from .verdicts import echo_entry, format_counts

if TYPE_CHECKING:
    from merging.hub.query import Query
    from merging.pool import Pool

__all__ = ["build_command"]


@click.command(name="build", short_help="audit adapters, and keep those that are worth it")
@pool_argument
@click.argument("paths", nargs=-1, type=MODEL, metavar="[PATH...]")
@click.option("--base", type=MODEL, help="the model that the adapters were trained from  [needed for a new pool]")
@click.option(
    "--base-name",
    "base_names",
    multiple=True,
    metavar="ORG/NAME",
    help="another name of this base in configs",
)
@click.option("--hub", is_flag=True, help="the adapters of the base on the Hub")
@click.option("--query", metavar="hub:...", help="other adapters of the Hub: hub:author=ORG,tag=TAG,search=WORD")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="adapters of the Hub, at most")
@click.option(
    "--sort",
    type=click.Choice(["downloads", "created"]),
    default="downloads",
    show_default=True,
    help="which adapters of the Hub come first",
)
@click.option("--again", is_flag=True, help="audit adapters again that were audited before")
@owner_cap_option
@license_option
@evaluation_options
@json_option
@debug_option
def build_command(
    pool: Path,
    paths: tuple[str, ...],
    base: str | None,
    base_names: tuple[str, ...],
    hub: bool,
    query: str | None,
    limit: int,
    sort: Any,
    again: bool,
    owner_cap: int | None,
    allow_unknown_licence: bool | None,
    as_json: bool,
    debug: bool,
    **others: Any,
) -> None:
    """Audit adapters and keep those that are worth it; adapters that a POOL knows are not looked at again.

    A PATH is an adapter, a folder of adapters, or one on the Hub. A build that was interrupted goes on when it is
    started again.
    """
    with handle_errors(debug, PoolStatus(pool)):
        from merging.errors import OptionError
        from merging.hub.query import Query
        from merging.pool.candidates import candidates_in, candidates_of

        if not paths and not hub and not query:
            raise OptionError("which adapters? Name paths, or use --hub or --query")
        searches = [_parse(query)] if query else []
        candidates = [each for path in paths for each in candidates_in(path)]
        opened = _open_pool(pool, base, base_names)
        if hub:
            searches.insert(0, Query(base=_name_on_hub(opened), limit=limit))
        for search in searches:
            candidates += candidates_of(replace(search, limit=min(limit, search.limit), sort=sort))
        built = opened.build(
            candidates,
            again=again,
            owner_cap=owner_cap,
            allow_unknown_licence=allow_unknown_licence,
            engine=pop_engine(others),
            on_event=echo_entry,
        )
    if as_json:
        echo_json({"pool": str(pool), "audited": built.audited, "verdicts": built.verdicts})
    else:
        echo(f"{pool}: {plural(built.audited, 'adapter')} audited; {format_counts(built.verdicts)}")


def _open_pool(pool: Path, base: str | None, base_names: tuple[str, ...]) -> Pool:
    """Open the pool, or create it if there is none."""
    from merging.errors import OptionError
    from merging.pool import Pool
    from merging.pool.index import is_pool

    if is_pool(pool):
        opened = Pool(pool)
        if base is not None and base != opened.base and str(Path(base).resolve()) != opened.base:
            raise OptionError(f"{pool}: is a pool of {opened.base} already: leave out --base")
        opened.add_base_names(base_names)
        return opened
    if base is None:
        raise OptionError(f"{pool}: is a new pool: say with --base which model its adapters were trained from")
    return Pool.create(pool, base, base_names)


def _parse(query: str) -> Query:
    """Read a query of the Hub."""
    from merging.errors import OptionError
    from merging.hub.query import parse_query

    parsed = parse_query(query)
    if parsed is None:
        raise OptionError(f"--query {query}: begins with hub:")
    return parsed


def _name_on_hub(pool: Pool) -> str:
    """Return the name of a pool's base on the Hub."""
    from merging.errors import OptionError

    for name in pool.base_names:
        if name.count("/") == 1 and "@" not in name:
            return name
    raise OptionError("--hub: what is the base called on the Hub? Say so with --base-name ORG/NAME")
