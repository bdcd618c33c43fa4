"""A page for each command of ``merge``, made from its click command."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache

import click
from marks import cell, escape

from merging.cli.main import cli, merge_command


@cache
def command_pages() -> dict[str, str]:
    """Return the text of each page by its path under docs/: all commands, merging, then the others."""
    pages = {"cli/index.md": _contents(), "cli/merge.md": _page("merge", merge_command)}
    for name, command in cli.commands.items():
        pages.setdefault(f"cli/{name}.md", _page(f"merge {name}", command))
    return pages


def _contents() -> str:
    """Return a table of all commands, in the sections of ``merge --help``."""
    parts = ["---\ntitle: Commands\n---\n\n# Commands"]
    for title, commands in cli.sections.items():
        rows = [
            f"| [`merge {each.name}`]({each.name}.md) | {cell(each.get_short_help_str(1000))} |" for each in commands
        ]
        parts += [f"## {title}", "\n".join(["| command | what it is |", "|---|---|", *rows])]
    parts.append("`merge` without a command merges: `merge merge` may be written as `merge`. Every command has `-h`.")
    return "\n\n".join(parts) + "\n"


def _page(path: str, command: click.Command) -> str:
    parts = [f"---\ntitle: {path}\n---\n\n# `{path}`", *_parts(path, command)]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            parts += [f"## `{path} {name}`", *_parts(f"{path} {name}", inner)]
    return "\n\n".join(parts) + "\n"


def _parts(path: str, command: click.Command) -> Iterator[str]:
    """Yield usage, help and options of one command."""
    context = click.Context(command, info_name=path, help_option_names=["-h", "--help"])
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        verbatim = paragraph.startswith("\b")
        yield f"```text\n{paragraph[1:].strip()}\n```" if verbatim else escape(paragraph)
    options = [each for each in command.get_params(context) if isinstance(each, click.Option) and not each.hidden]
    if options:
        rows = [f"| {_flags(each, context)} | {_help(each, context)} |" for each in options]
        yield "\n".join(["| option | what it does |", "|---|---|", *rows])


def _flags(option: click.Option, context: click.Context) -> str:
    """Return the names of an option and its values, as code."""
    record = option.get_help_record(context)
    return " ".join(f"`{word}`" for word in (record[0] if record else "").split(", "))


def _help(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    return cell(record[1] if record else "")
