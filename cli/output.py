"""The one door through which the command prints: lines, JSON, plans, outcomes, progress.

Names and values of files may be hostile: all that is printed passes here, and is escaped.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from merging.display.tables import format_size, plural
from merging.errors import escape_unprintable, shorten

if TYPE_CHECKING:
    from pathlib import Path

    from merging.api.merge_files import Merged
    from merging.api.predict import Prediction
    from merging.plan import Plan

    from .execution import Execution

__all__ = [
    "QUIET",
    "echo",
    "echo_json",
    "echo_merged",
    "echo_notices",
    "echo_plan",
    "echo_text",
    "echo_usage",
    "format_size",
    "plural",
    "show_progress",
    "terminal_width",
]

_LONGEST = 4000
"""Characters of a line; names and paths are shorter, and only texts of strangers are longer."""

QUIET = f"{__name__}.quiet"
"""The key of a context's ``meta`` for --quiet: only errors and JSON are printed, and errors are printed after it."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; where the shell closed it (``>&-``), there is none."""
    return stream is not None and stream.isatty()


def terminal_width() -> int | None:
    """Return the columns of the terminal that standard output is; None if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


@contextmanager
def show_progress(form: str | None, task_name: str = "merging") -> Iterator[Callable[[int, int], None] | None]:
    """Show progress on stderr in a form: by default a bar on a terminal, else lines."""
    if _is_quiet() or sys.stderr is None:
        yield None
        return
    from merging.display.progress import ProgressBar, ProgressEvents, ProgressLines

    form = form or ("bar" if is_terminal(sys.stderr) else "lines")
    if form == "bar":
        with closing(ProgressBar(task_name, leave=False)) as bar:
            yield bar
    else:
        yield {"lines": ProgressLines, "json": ProgressEvents}[form](task_name)


def echo(line: str, err: bool = False) -> None:
    """Print one line. Ends of lines in it are escaped like control characters, so that no name makes up lines."""
    if not _is_quiet():
        click.echo(escape_unprintable(shorten(line, _LONGEST)), err=err)


def echo_text(text: str, err: bool = False) -> None:
    """Print lines of the program's own, in which no name of a file stands."""
    if not _is_quiet():
        click.echo(escape_unprintable(text, lines=True), err=err)


def _is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(QUIET, False)


def echo_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON in ASCII; a number that JSON cannot hold (NaN, infinity) becomes null."""
    click.echo(json.dumps(_finite(value), indent=indent, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def echo_plan(
    plan: Plan,
    destination: Path,
    execution: Execution,
    settings: Sequence[str] = (),
    prediction: Prediction | None = None,
) -> None:
    """Print a plan: changes of its recipe, the bytes to read and write, the memory that it takes, and its notices.

    A prediction adds its facts.
    """
    from merging.engine.resources import workers_within
    from merging.engine.threads import cores
    from merging.plan.recipe import plain_entry

    threads = cores() if execution.threads is None else execution.threads
    workers = workers_within(plan, threads, execution.max_memory)
    facts: dict[str, Any] = {
        "method": plan.recipe.method.chain,
        "models": [plain_entry(each) for each in plan.recipe.models],
        "base": None if plan.recipe.base is None else plain_entry(plan.recipe.base),
        "output": str(destination),
        "kind": plan.output,
        "format": plan.format if plan.output == "adapter" else None,
        "rank": plan.rank or None,
        "tensors": len(plan.outs),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.out_bytes,
        "workers": workers,
        "set_aside_bytes": plan.spool_bytes + plan.stage_bytes,
        "peak_memory_bytes": plan.memory(workers),
        "matched": list(plan.matched),
        "notices": list(plan.notices),
        **({"set": list(settings)} if settings else {}),
        **({"prediction": prediction.to_dict()} if prediction else {}),
    }
    if execution.as_json:
        echo_json(facts)
        return
    rank = f" of rank {plan.rank}" if plan.rank else ""
    echo(f"{facts['method']}: {plural(len(plan.models), 'model')} into the {_kind(plan)}{rank} {destination}")
    for setting in settings:
        echo(f"  set     {setting}")
    echo(f"  reads   {format_size(plan.read_bytes)}")
    echo(f"  writes  {format_size(plan.out_bytes)} in {plural(len(plan.outs), 'tensor')}")
    memory = format_size(facts["peak_memory_bytes"])
    echo(f"  memory  {memory} at most for {plural(workers, 'worker')}, above the imports")
    if plan.spool_bytes:
        echo(f"  disk    {format_size(plan.spool_bytes)} to set merged changes aside meanwhile")
    _echo_stages(plan)
    for name, text in prediction.lines() if prediction else ():
        echo(f"  {name:6}  {text}")
    for line in plan.matched:
        echo(f"  {line}")
    echo_notices([*plan.notices, *(prediction.notices if prediction else ())])


def _echo_stages(plan: Plan) -> None:
    """Print the merges whose outputs are models of this one, and whether they need room on the disk."""
    from merging.plan.stages import all_stages

    if plan.stage_bytes:
        echo(f"  disk    {format_size(plan.stage_bytes)} to set stages aside meanwhile")
    for stage in all_stages(plan.stages):
        size = format_size(stage.plan.out_bytes)
        way = "computed when it is read" if stage.lazy else f"set aside, {size}"
        count = plural(len(stage.plan.models), "model")
        echo(f"  stage   {stage.name}: {count} by {stage.plan.recipe.method.chain}, {way}")


def echo_merged(merged: Merged, plan: Plan) -> None:
    """Print where the output is, its kind and size; notices go to stderr."""
    for line in plan.matched:
        echo(line, err=True)
    echo_notices(merged.notices)
    meanings = plan.recipe.method.meanings_of_metrics()
    for fact, value in merged.facts.items():
        meaning = f" ({meanings[fact]})" if fact in meanings else ""
        echo(f"{fact}: {value:.4g}{meaning}", err=True)
    rank = f" of rank {merged.rank}" if merged.rank else ""
    echo(
        f"{merged.path}: {_kind(plan)}{rank}, {plural(len(plan.models), 'model')} by {merged.method}, "
        f"{plural(merged.tensors, 'tensor')}, {format_size(merged.bytes)} in {merged.seconds:.1f} s"
    )


def echo_usage(usage: str) -> None:
    """Print how to use an output on stderr, if that is known."""
    if usage:
        echo(f"to use it: {usage}", err=True)


def _kind(plan: Plan) -> str:
    """Return the kind of the output, after the format of an adapter that is not PEFT's."""
    plain = plan.output == "model" or plan.format in ("peft", "as given")
    return plan.output if plain else f"{plan.format} {plan.output}"


def echo_notices(notices: Sequence[str]) -> None:
    """Print the notices of a plan or an outcome on stderr."""
    for notice in notices:
        echo(notice if notice.startswith("warning: ") else f"note: {notice}", err=True)
