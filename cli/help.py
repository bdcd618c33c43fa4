"""Help of groups of commands, in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .spelling import to_american

__all__ = ["CONTEXT", "SectionedGroup"]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "token_normalize_func": to_american}
"""Settings of the contexts of all commands."""


class SectionedGroup(click.Group):
    """A group of commands that lists them in sections, by their titles."""

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[click.Command]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sections = sections
        for command in (command for commands in sections.values() for command in commands):
            # click keeps the help option of the first context that asks, which may have no parent
            command.context_settings = {**CONTEXT, **command.context_settings}
            self.add_command(command)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the sections."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, and then the options."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section: the names of its commands and their short helps, whole."""
        width = max(map(len, self.commands))
        for title, commands in self.sections.items():
            with formatter.section(title):
                rows = [(f"{command.name:{width}}", command.get_short_help_str(limit=1000)) for command in commands]
                formatter.write_dl(rows)
