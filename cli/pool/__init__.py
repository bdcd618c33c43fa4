"""``merge pool``: adapters of one base that others left, audited and indexed."""

from __future__ import annotations

import click

from ..help import SectionedGroup
from .audit import audit_command
from .build import build_command
from .dedupe import dedupe_command
from .list import list_command
from .overrule import overrule_command
from .plot import plot_command
from .remove import remove_command
from .show import show_command
from .smoke import smoke_command
from .stats import stats_command

__all__ = ["pool_command"]


SECTIONS = {
    "Build": [build_command, audit_command, dedupe_command, smoke_command],
    "Look": [list_command, show_command, stats_command, plot_command],
    "Decide": [overrule_command, remove_command],
}


@click.command(
    cls=SectionedGroup,
    sections=SECTIONS,
    name="pool",
    short_help="audit and index the adapters of one base",
)
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
