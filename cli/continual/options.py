"""What commands of a store share: arguments, options, and what they say when they are interrupted."""

from __future__ import annotations

from typing import Any

import click

from ..output import Size

__all__ = ["Standing", "as_json_option", "debug_option", "lenient", "store_argument", "wait_option", "working"]

as_json_option = click.option("--json", "as_json", is_flag=True, help="print as JSON")
debug_option = click.option("--debug", is_flag=True, help="show a traceback with errors")
store_argument = click.argument("store", type=click.Path())
wait_option = click.option("--wait", type=float, help="most seconds to wait for another writer  [default: no limit]")


def working(command: Any) -> Any:
    """Give a command the options of those that merge."""
    return _with(
        command,
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto"),
        click.option("--threads", type=int, help="workers  [default: all cores]"),
        click.option("--max-memory", type=Size(), help="most memory above the imports, such as 500MB"),
    )


def lenient(command: Any) -> Any:
    """Give a command the options that let models in which do not quite fit."""
    return _with(
        command,
        click.option("--allow-different-bases", is_flag=True, help="add what says, or seems, to be of another base"),
        click.option(
            "--on-mismatch",
            type=click.Choice(["error", "base"]),
            default="error",
            show_default=True,
            help="tensors that a model lacks or has in another shape: refuse it, or leave them as they are",
        ),
    )


def _with(command: Any, *options: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


class Standing:
    """What is true of a store after a command on it was interrupted, by its manifest.

    ``before`` is the number of models that it held when the command began, where that may have grown.
    """

    def __init__(self, store: str, before: int | None = None) -> None:
        self.store = store
        self.before = before

    def __call__(self) -> str:
        from merging.continual import ContinualStore
        from merging.errors import MergingError

        try:
            models = len(ContinualStore(self.store).manifest().steps)
        except MergingError:
            return f"there is no store {self.store}"
        more = "" if self.before is None else f", {models - self.before} more than before"
        return f"{self.store} is whole, and holds {models} model{'s' * (models != 1)}{more}"
