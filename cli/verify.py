"""``merge verify``: faults for which a program would refuse or ignore a model."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import click

from merging.errors import OptionError, shorten

from .errors import handle_errors
from .options import debug_option, json_option, max_memory_option, progress_option, threads_option
from .output import echo, echo_json, show_progress
from .rerun import parse_sources
from .tables import echo_table
from .types import MODEL, SAMPLE

if TYPE_CHECKING:
    from merging.serving import Finding, Verdict

__all__ = ["verify_command"]

_SHOWN = 3
_LONGEST = 600
"""Characters of a finding, which may quote values of a file."""


def complete_program(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    """Return the programs whose names begin with a text."""
    from merging.serving import PROGRAMS

    return [name for name in PROGRAMS if name.startswith(incomplete)]


@click.command(name="verify", short_help="find faults for which a program would refuse or ignore a model")
@click.argument("path", type=MODEL)
@click.option(
    "--for",
    "programs",
    multiple=True,
    metavar="PROGRAM",
    shell_complete=complete_program,
    help="vllm, sglang, llama.cpp, peft, diffusers, transformers or comfyui; may be repeated  [default: all that fit]",
)
@click.option(
    "--base",
    type=MODEL,
    help="an adapter's base: its folder, or ORG/NAME  [default: the base in its config, if it is here]",
)
@click.option(
    "--max-lora-rank",
    type=click.IntRange(1),
    metavar="RANK",
    help="the largest rank that the server is started for  [default: its own]",
)
@click.option("--values", is_flag=True, help="read all values too, for NaN, infinities and copies of the embedding")
@click.option("--load", is_flag=True, help="have PEFT, transformers or diffusers really load it")
@click.option("--against-sources", is_flag=True, help="recompute pieces from its sources, and compare the bits")
@click.option(
    "--sample",
    type=SAMPLE,
    help="with --against-sources: the number of pieces, or all  [default: 256]",
)
@click.option("--seed", type=click.IntRange(0), help="with --against-sources: the seed that chooses the pieces")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=PATH",
    help="with --against-sources: the place of a model that was moved, by its name in the recipe; may be repeated",
)
@threads_option
@max_memory_option
@progress_option
@json_option
@debug_option
def verify_command(
    path: str,
    programs: tuple[str, ...],
    base: str | None,
    max_lora_rank: int | None,
    values: bool,
    load: bool,
    against_sources: bool,
    sample: int | Literal["all"] | None,
    seed: int | None,
    sources: tuple[str, ...],
    threads: int | None,
    max_memory: int | None,
    progress: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Find the faults for which a program would refuse an adapter or model, or silently ignore a part of it.

    PATH is a folder, a file, or a name on the Hub. Headers alone are read. With --against-sources, the merge in the
    output's header is planned again: all tensors and files must be there, and a sample is merged again. The exit code
    is 0 if nothing is refused, silently ignored, or differs, else 1.
    """
    with handle_errors(debug):
        from merging.serving import verify

        pieces: dict[str, Any] = {
            name: value for name, value in (("sample", sample), ("seed", seed)) if value is not None
        }
        idle = [*pieces, *(["source"] if sources else [])]
        if idle and not against_sources:
            raise OptionError(f"--{idle[0]} is for --against-sources: add it")
        verdict = verify(path, programs, base=base, max_lora_rank=max_lora_rank, values=values, load=load)
        if against_sources:
            from merging.api.against_sources import verify_against_sources

            with show_progress(progress, "comparing") as report:
                against = verify_against_sources(
                    path,
                    sources=parse_sources(sources),
                    **pieces,
                    threads=threads,
                    max_memory=max_memory,
                    progress=report,
                )
            verdict = replace(verdict, findings=(*verdict.findings, *against.findings))
    if as_json:
        echo_json({**asdict(verdict), "served": verdict.served})
    else:
        _print(verdict)
    if not verdict.served:
        raise click.exceptions.Exit(1)


def _print(verdict: Verdict) -> None:
    article = "an" if verdict.kind[0] in "aeiou" else "a"
    echo(verdict.path if verdict.kind == "unknown" else f"{verdict.path}: {article} {verdict.kind}")
    rows: list[tuple[str, ...]] = []
    for finding in verdict.findings:
        rows.append(("", finding.program, finding.severity, shorten(finding.what, _LONGEST)))
        rows += [("", "", "", line) for line in _details(finding)]
    if not verdict.values_read and verdict.kind != "unknown":
        rows.append(("", "values", "-", "not read (--values)"))
    echo_table(rows)


def _details(finding: Finding) -> list[str]:
    more = len(finding.where) - _SHOWN
    lines = [*map(shorten, finding.where[:_SHOWN]), *([f"and {more:,} more"] if more > 0 else [])]
    return lines + ([f"-> {shorten(finding.todo, _LONGEST)}"] if finding.todo else [])
