"""``merge run``: carry out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .errors import Placed, reported
from .executing import execute, execution_options

__all__ = ["run_command"]


@click.command(name="run")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@execution_options
def run_command(recipe: Path, **execution: Any) -> None:
    """Carry out a RECIPE: YAML with models, method and parameters, as --recipe-only prints it."""
    standing = Placed()
    with reported(execution["debug"], standing):
        from merging.plan.recipe import load_recipe
        from merging.sources.small_files import RECIPE_LIMIT, read_text

        execute(load_recipe(read_text(recipe, RECIPE_LIMIT, given=True), str(recipe)), standing, **execution)
