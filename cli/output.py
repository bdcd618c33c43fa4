"""The one door through which the command prints: lines, JSON, plans, outcomes, progress; and sizes as people write.

Names and values of files may be hostile: all that is printed passes here, and is escaped.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from merging.errors import escape_unprintable, shorten

if TYPE_CHECKING:
    from pathlib import Path

    from merging.api.merge_files import Merged
    from merging.plan import Plan

__all__ = [
    "Size",
    "echo",
    "echo_json",
    "echo_merged",
    "echo_notices",
    "echo_plan",
    "echo_text",
    "progress_bar",
    "size_text",
]

_LONGEST = 4000
"""Characters of a line; names and paths are shorter, and only texts of strangers are longer."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType):
    """Bytes, as in 500MB, 2GiB or 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
        if not found or found[2] not in _UNITS or float(found[1]) <= 0:
            self.fail(f"{value!r} is no size: write 500MB, 2GB or 2GiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


def size_text(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


@contextmanager
def progress_bar(wanted: bool | None, what: str = "merging") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, by default only if that is a terminal."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def echo(line: str, err: bool = False) -> None:
    """Print one line. Ends of lines in it are escaped like control characters, so that no name makes up lines."""
    click.echo(escape_unprintable(shorten(line, _LONGEST)), err=err)


def echo_text(text: str, err: bool = False) -> None:
    """Print lines of the program's own, in which no name of a file stands."""
    click.echo(escape_unprintable(text, lines=True), err=err)


def echo_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON in ASCII; a number that JSON cannot hold (NaN, infinity) becomes null."""
    click.echo(json.dumps(_finite(value), indent=indent, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def echo_plan(plan: Plan, destination: Path, threads: int | None, max_memory: int | None, as_json: bool) -> None:
    """The plan: what is read and written, how much memory it takes, and what should be known beforehand."""
    from merging.engine.resources import workers_within
    from merging.engine.threads import cores

    workers = workers_within(plan, cores() if threads is None else threads, max_memory)
    facts: dict[str, Any] = {
        "method": plan.recipe.method.chain,
        "models": list(plan.recipe.models),
        "base": plan.recipe.base,
        "output": str(destination),
        "kind": plan.output,
        "format": plan.format if plan.output == "adapter" else None,
        "rank": plan.rank or None,
        "tensors": len(plan.outs),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.out_bytes,
        "workers": workers,
        "set_aside_bytes": plan.spool_bytes,
        "peak_memory_bytes": plan.memory(workers),
        "matched": list(plan.matched),
        "notices": list(plan.notices),
    }
    if as_json:
        echo_json(facts)
        return
    rank = f" of rank {plan.rank}" if plan.rank else ""
    echo(f"{facts['method']}: {_models(plan)} into the {_kind(plan)}{rank} {destination}")
    echo(f"  reads   {size_text(plan.read_bytes)}")
    echo(f"  writes  {size_text(plan.out_bytes)} in {len(plan.outs)} tensors")
    echo(f"  memory  {size_text(facts['peak_memory_bytes'])} at most for {workers} workers, above the imports")
    if plan.spool_bytes:
        echo(f"  disk    {size_text(plan.spool_bytes)} to set merged changes aside meanwhile")
    for line in plan.matched:
        echo(f"  {line}")
    echo_notices(plan.notices)


def echo_merged(merged: Merged, plan: Plan) -> None:
    """Where the output is and what it is; notices go to stderr."""
    for line in plan.matched:
        echo(line, err=True)
    echo_notices(merged.notices)
    for fact, value in merged.facts.items():
        echo(f"{fact}: {value:.4g}", err=True)
    rank = f" of rank {merged.rank}" if merged.rank else ""
    echo(
        f"{merged.path}: {_kind(plan)}{rank}, {_models(plan)} by {merged.method}, {merged.tensors} tensors, "
        f"{size_text(merged.bytes)} in {merged.seconds:.1f} s"
    )


def _models(plan: Plan) -> str:
    return "1 model" if len(plan.models) == 1 else f"{len(plan.models)} models"


def _kind(plan: Plan) -> str:
    """The kind of the output; for an adapter in another format than PEFT's, that format too."""
    plain = plan.output == "model" or plan.format in ("peft", "as given")
    return plan.output if plain else f"{plan.format} {plan.output}"


def echo_notices(notices: Sequence[str]) -> None:
    """Print what should be known of a plan or an outcome, on stderr."""
    for notice in notices:
        echo(notice if notice.startswith("warning: ") else f"note: {notice}", err=True)
