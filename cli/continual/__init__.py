"""``merge continual``: a store that grows as models arrive."""

from __future__ import annotations

import click

from ..help import SectionedGroup
from .add import add_command
from .export import export_command
from .gc import gc_command
from .init import init_command
from .log import log_command
from .plot import plot_command
from .relocate import relocate_command
from .rollback import rollback_command
from .status import status_command
from .verify import verify_command
from .watch import watch_command

__all__ = ["continual_command"]


SECTIONS = {
    "Grow": [init_command, add_command, watch_command],
    "Look": [status_command, log_command, plot_command],
    "Publish": [export_command],
    "Keep in order": [rollback_command, verify_command, gc_command, relocate_command],
}


@click.command(
    cls=SectionedGroup,
    sections=SECTIONS,
    name="continual",
    short_help="merge models into a store as they arrive",
)
def continual_command() -> None:
    """Merge models as they arrive, one step each, in constant memory, without keeping the old ones.

    \b
    merge continual init STORE --base BASE        an empty store
    merge continual add STORE one/ two/           in this order
    merge continual export STORE -o merged/       the merge of all so far
    """
