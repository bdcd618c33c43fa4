"""Arguments and options that commands of a store share, and its state after an interruption."""

from __future__ import annotations

import click

from ..options import add_options, device_option, max_memory_option, threads_option
from ..output import plural

__all__ = ["StoreStatus", "keep_states_option", "leniency_options", "resource_options", "store_argument", "wait_option"]

store_argument = click.argument("store", type=click.Path())
keep_states_option = click.option(
    "--keep", type=int, metavar="N", help="remove all states but the last N after each step  [default: keep all]"
)
wait_option = click.option("--wait", type=float, help="most seconds to wait for another writer  [default: no limit]")
resource_options = add_options(device_option, threads_option, max_memory_option)
leniency_options = add_options(
    click.option("--allow-different-bases", is_flag=True, help="add models that state, or seem to have, another base"),
    click.option(
        "--on-mismatch",
        type=click.Choice(["error", "base"]),
        default="error",
        show_default=True,
        help="tensors that a model lacks or has in another shape: refuse it, or leave them as they are",
    ),
)


class StoreStatus:
    """The sentence about a store after a command on it was interrupted, by its manifest.

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
        return f"{self.store} is whole, and holds {plural(models, 'model')}{more}"
