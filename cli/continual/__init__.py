"""``merge continual``: a store that grows as models arrive."""

from __future__ import annotations

import click

from .growing import add_command, init_command, watch_command
from .keeping import export_command, gc_command, relocate_command, rollback_command, verify_command
from .telling import log_command, plot_command, status_command

__all__ = ["continual_command"]


@click.group(name="continual")
def continual_command() -> None:
    """Merge models as they arrive, one step each, in constant memory, without keeping the old ones.

    \b
    merge continual init STORE --base BASE        an empty store
    merge continual add STORE one/ two/           in this order
    merge continual export STORE -o merged/       the merge of all so far
    """


for _command in (
    init_command,
    add_command,
    watch_command,
    status_command,
    log_command,
    plot_command,
    export_command,
    rollback_command,
    relocate_command,
    verify_command,
    gc_command,
):
    continual_command.add_command(_command)
