"""Arguments and options that commands of a pool share, and its state after an interruption."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["PoolStatus", "license_option", "owner_cap_option", "pool_argument"]

pool_argument = click.argument("pool", type=click.Path(path_type=Path))
owner_cap_option = click.option(
    "--owner-cap", type=int, help="adapters of one owner, at most  [default: as before; at first 10]"
)
license_option = click.option(
    "--allow-unknown-license/--refuse-unknown-license",
    "allow_unknown_licence",
    default=None,
    help="take adapters of the Hub that state no license  [default: as before; at first no]",
)


class PoolStatus:
    """The sentence about a pool after an interruption: whether the work so far is kept."""

    def __init__(self, pool: Path) -> None:
        self.pool = pool

    def __call__(self) -> str:
        from merging.pool.index import is_pool

        if is_pool(self.pool):
            return "what was found so far is kept, and the same command goes on"
        return "nothing was written"
