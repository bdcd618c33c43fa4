"""``merge run``: carry out a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options

__all__ = ["run_command"]


@click.command(name="run", short_help="carry out a recipe (YAML)")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@execution_options
def run_command(recipe: Path, execution: Execution) -> None:
    """Carry out a RECIPE: YAML with models, method and parameters, as --recipe-only prints it."""
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.plan.recipe import load_recipe
        from merging.sources.small_files import RECIPE_LIMIT, read_text

        execute(load_recipe(read_text(recipe, RECIPE_LIMIT, given=True), str(recipe)), execution, status)
