"""``merge pool``: adapters of one base that others left, audited and indexed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merging.errors import shorten

from .errors import Placed, reported
from .output import echo, echo_json, size_text
from .overruling import overrule_command

if TYPE_CHECKING:
    from merging.pool import Entry

__all__ = ["pool_command"]

_REASON = 600
"""Characters of a reason, which may quote values of a file."""

_pool = click.argument("pool", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="print as JSON")
_debug = click.option("--debug", is_flag=True, help="show a traceback with errors")
_cap = click.option("--owner-cap", type=int, help="adapters of one owner, at most  [default: as before; at first 10]")
_licences = click.option(
    "--allow-unknown-licence/--refuse-unknown-licence",
    default=None,
    help="take adapters of the Hub that state no licence  [default: as before; at first no]",
)


@click.group(name="pool")
def pool_command() -> None:
    """Adapters of one base that others left: audited, without repeats, indexed.

    \b
    merge pool build POOL --base BASE a/ b/ c/          from folders and files
    merge pool build POOL --base ORG/BASE --hub         from the Hub: all adapters that name this base
    merge pool smoke POOL                               the base runs with each: destroyed, or no change?
    merge pool list POOL                                every adapter, its verdict and figures
    merge pool show POOL NAME                           all that was found of one
    merge pool overrule POOL NAME --as ok --reason WHY  a verdict of your own

    A verdict is ok, repaired (read as it is meant, with the reason), quarantined (kept, but not chosen) or rejected.
    Nothing is dropped in silence: the index holds every adapter that was looked at.
    """


@pool_command.command(name="build")
@_pool
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--base", help="the model that the adapters were trained from  [needed for a new pool]")
@click.option("--base-name", "base_names", multiple=True, metavar="ORG/NAME", help="what adapters call this base too")
@click.option("--hub", is_flag=True, help="the adapters of the base on the Hub")
@click.option("--query", metavar="hub:...", help="other adapters of the Hub: hub:author=ORG,tag=TAG,search=WORD")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="adapters of the Hub, at most")
@click.option("--sort", type=click.Choice(["downloads", "created"]), default="downloads", show_default=True)
@click.option("--again", is_flag=True, help="audit also what was audited before")
@_cap
@_licences
@_json
@_debug
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
) -> None:
    """Audit adapters and keep what is worth it; what a POOL knows already is not looked at again.

    A PATH is an adapter, a folder of adapters, or one on the Hub. A build that was interrupted goes on when it is
    started again.
    """
    with reported(debug, lambda: _standing(pool)):
        from dataclasses import replace

        from merging.errors import OptionError
        from merging.hub.query import Query, parse_query
        from merging.pool import Pool
        from merging.pool.candidates import candidates_in, candidates_of
        from merging.pool.index import is_pool

        if not paths and not hub and not query:
            raise OptionError("which adapters? Name paths, or use --hub or --query")
        asked = parse_query(query) if query else None
        if query and asked is None:
            raise OptionError(f"--query {query}: begins with hub:")
        candidates = [each for path in paths for each in candidates_in(path)]
        if is_pool(pool):
            opened = Pool(pool)
            if base is not None and base != opened.base and str(Path(base).resolve()) != opened.base:
                raise OptionError(f"{pool}: is a pool of {opened.base} already: leave out --base")
            opened.also_called(base_names)
        elif base is None:
            raise OptionError(f"{pool}: is a new pool: say with --base which model its adapters were trained from")
        else:
            opened = Pool.create(pool, base, base_names)
        if hub:
            repo = next((name for name in opened.base_names if name.count("/") == 1 and "@" not in name), None)
            if repo is None:
                raise OptionError("--hub: what is the base called on the Hub? Say so with --base-name ORG/NAME")
            candidates += candidates_of(Query(base=repo, limit=limit, sort=sort))
        if asked:
            candidates += candidates_of(replace(asked, limit=min(limit, asked.limit), sort=sort))
        built = opened.build(
            candidates, again=again, owner_cap=owner_cap, allow_unknown_licence=allow_unknown_licence, tell=_tell
        )
    if as_json:
        echo_json({"pool": str(pool), "audited": built.audited, "verdicts": built.verdicts})
    else:
        echo(f"{pool}: {built.audited} audited; {_counts(built.verdicts)}")


@pool_command.command(name="list")
@_pool
@click.option("--verdict", "verdicts", multiple=True, type=click.Choice(["ok", "repaired", "quarantined", "rejected"]))
@_json
@_debug
def list_command(pool: Path, verdicts: tuple[Any, ...], as_json: bool, debug: bool) -> None:
    """Every adapter that was looked at: verdict, rank, size, norm relative to the base, and why."""
    with reported(debug):
        from merging.pool import Pool
        from merging.pool.index import VERDICTS

        entries = Pool(pool).index.entries(verdicts or VERDICTS)
    if as_json:
        echo_json([entry.to_dict() for entry in entries])
        return
    for entry in entries:
        size = f"{entry.figures.get('relative_norm', 0.0):.2%}" if entry.norm is not None else "-"
        echo(f"{entry.verdict:11} {entry.rank or '-':>4} {size:>8}  {entry.name}{_reasons(entry)}")


@pool_command.command(name="show")
@_pool
@click.argument("name")
@_json
@_debug
def show_command(pool: Path, name: str, as_json: bool, debug: bool) -> None:
    """All that was found of one adapter; NAME as `list` prints it, or the end of it."""
    with reported(debug):
        from merging.pool import Pool

        entry = Pool(pool).index.entry(name)
    if as_json:
        echo_json(entry.to_dict())
        return
    echo(entry.name)
    facts = {key: value for key, value in entry.to_dict().items() if key not in ("name", "figures", "findings")}
    for key, value in {**facts, **entry.figures}.items():
        if value not in (None, ""):
            shown = size_text(value) if key == "size" else f"{value:.4g}" if isinstance(value, float) else value
            echo(f"  {key:18} {shorten(str(shown))}")
    for finding in entry.findings:
        echo(f"  {finding.stage:12} {finding.verdict}: {shorten(finding.reason, _REASON)}")


@pool_command.command(name="audit")
@_pool
@click.argument("names", nargs=-1, metavar="[NAME...]")
@_json
@_debug
def audit_command(pool: Path, names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Audit adapters of the pool anew, from where they came; without a NAME all of them.

    NAME is as `list` prints it, or the end of it.
    """
    with reported(debug, lambda: _standing(pool)):
        from merging.pool import Pool
        from merging.pool.audit import Candidate

        opened = Pool(pool)
        entries = [opened.index.entry(name) for name in names] or opened.index.entries()
        candidates = [Candidate(e.name, e.owner, e.created, e.downloads) for e in entries]
        built = opened.build(candidates, again=True, tell=_tell)
    _told(pool, built.verdicts, as_json)


@pool_command.command(name="dedupe")
@_pool
@_cap
@_licences
@_json
@_debug
def dedupe_command(
    pool: Path, owner_cap: int | None, allow_unknown_licence: bool | None, as_json: bool, debug: bool
) -> None:
    """Compare all with all anew: repeats, owners with too many, norms far from the others', licences."""
    with reported(debug):
        from merging.pool import Pool

        verdicts = Pool(pool).dedupe(owner_cap, allow_unknown_licence, tell=_tell)
    _told(pool, verdicts, as_json)


@pool_command.command(name="smoke")
@_pool
@click.option("--texts", type=click.Path(), help="plain texts of your own, one a line  [default: 24 English ones]")
@click.option("--destroyed", type=float, help="times the base's perplexity that are too many  [default: as before; 3]")
@click.option(
    "--collapsed", type=float, help="share of the features' spread that is too little  [default: as before; 0.1]"
)
@click.option("--unchanged", type=float, help="change of the outputs that is none  [default: as before; 0.001]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto")
@click.option("--again", is_flag=True, help="also those that were tested before")
@_json
@_debug
def smoke_command(
    pool: Path, texts: str | None, device: str, again: bool, as_json: bool, debug: bool, **limits: float | None
) -> None:
    """Run the base with every adapter over a few texts, and quarantine those that destroy it or change nothing.

    A language model is destroyed where plain text has over 3 times its perplexity, another where it hardly tells texts
    apart. New limits judge those that were tested before, too, by the figures that are noted. A test that was
    interrupted goes on when it is started again.
    """
    with reported(debug, lambda: _standing(pool)):
        from dataclasses import replace

        from merging.pool import Pool
        from merging.pool.smoke import read_texts
        from merging.pool.smoke_run import smoke_limits

        chosen, opened = read_texts(texts) if texts else None, Pool(pool)
        given = {name: value for name, value in limits.items() if value is not None}
        changed = replace(smoke_limits(opened.index), **given) if given else None
        verdicts = opened.smoke(chosen, limits=changed, device=device, again=again, tell=_tell)
    _told(pool, verdicts, as_json)


pool_command.add_command(overrule_command)


@pool_command.command(name="remove")
@_pool
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_json
@_debug
def remove_command(pool: Path, names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Forget adapters, delete their files, and compare what is left; NAME as `list` prints it, or the end of it."""
    with reported(debug):
        from merging.pool import Pool

        removed = Pool(pool).remove(names, tell=_tell)
    if as_json:
        echo_json({"pool": str(pool), "removed": removed})
    else:
        echo(f"{pool}: {len(removed)} removed")


@pool_command.command(name="stats")
@_pool
@_json
@_debug
def stats_command(pool: Path, as_json: bool, debug: bool) -> None:
    """What the pool holds: verdicts, reasons, owners, ranks, licences, sizes."""
    with reported(debug):
        from merging.pool import Pool
        from merging.pool.stats import stats

        facts = stats(Pool(pool))
    if as_json:
        echo_json(facts)
        return
    for key, value in facts.items():
        text = ", ".join(f"{name}: {each}" for name, each in value.items()) if isinstance(value, dict) else value
        echo(f"{key:14} {size_text(value) if key == 'bytes' else text}")


@pool_command.command(name="plot")
@_pool
@click.option("-o", "--output", required=True, type=click.Path(), help="a .png, .svg or .pdf")
@_debug
def plot_command(pool: Path, output: str, debug: bool) -> None:
    """Draw verdicts, ranks, and norms relative to the base (needs matplotlib)."""
    with reported(debug, Placed(output)):
        from merging.pool import Pool
        from merging.pool.plot import plot

        plot(Pool(pool), output)
    echo(output)


def _standing(pool: Path) -> str:
    from merging.pool.index import is_pool

    return "what was found so far is kept, and the same command goes on" if is_pool(pool) else "nothing was written"


def _tell(entry: Entry) -> None:
    echo(f"{entry.verdict:11} {entry.name}{_reasons(entry)}", err=True)


def _reasons(entry: Entry) -> str:
    own = [finding for finding in entry.findings if finding.stage == "overruled"]
    worst = [finding.reason for finding in own or entry.findings if finding.verdict == entry.verdict]
    return f": {shorten(worst[0], _REASON)}" if worst else ""


def _counts(verdicts: dict[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def _told(pool: Path, verdicts: dict[str, int], as_json: bool) -> None:
    if as_json:
        echo_json({"pool": str(pool), "verdicts": verdicts})
    else:
        echo(f"{pool}: {_counts(verdicts)}")
