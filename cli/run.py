"""``merge run``: carry out a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import OutputStatus, Refusal, handle_errors
from .execution import Execution, execute, execution_options
from .options import lenient_option
from .output import echo_notices, echo_text
from .recipe_source import load_source
from .run_several import run_several

__all__ = ["FULL_RECIPE", "SMALL_RECIPE", "run_command"]

SMALL_RECIPE = """\
models: [one/, two/]
method: ties
base: base/
"""

FULL_RECIPE = """\
models:                     # folders, files, or names on the Hub; paths are relative to this file
- one/
- two/
- three/
base: base/                 # the model that the others were trained from
method: breadcrumbs+ties    # wrappers from left to right, the merger last
parameters:                 # of the methods, by name; merge methods NAME lists them
  weights: [1, 0.5, 0.5]    # a list: a value for each model
  scale: 0.6:1:1.2          # points from the first block to the last, linear between them
  breadcrumbs.density: 0.9  # by method, where two methods of a chain share a name
  ties.density:             # by tensor: names, parts of names or wildcards; the first that matches counts
    LayerNorm: 1
    "*.attention.*": [0.3, 0.3, 0.1:0.4]
    "*": 0.2
  scope: tensor
as: model                   # or adapter; rank, format, experts and lora_alpha are for adapters
dtype: bfloat16
exclude: [embeddings]       # tensors that stay as they are in the base
layers: 6                   # blocks, where the names do not say how many
shard_size: 2000000000      # bytes of a file
on_mismatch: error          # or base: tensors of another shape stay the base's
vocabulary: error           # or base, or largest
allow_different_bases: false
allow_nonfinite: false
allow_unmatched: false
"""


class RunCommand(click.Command):
    """The command with two whole recipes in its help, which formatting leaves as they are."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the recipes."""
        for title, text in (("A small recipe", SMALL_RECIPE), ("A recipe with everything", FULL_RECIPE)):
            with formatter.section(title):
                formatter.write("".join(f"  {line}\n" for line in text.splitlines()))


@click.command(cls=RunCommand, name="run", short_help="carry out recipes (YAML)")
@click.argument(
    "recipes",
    nargs=-1,
    required=True,
    metavar="RECIPE...",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="change a value of the recipe: scale=0.5, models.1=other/ (lists count from 0), density.mlp=0.3; may be "
    "repeated",
)
@lenient_option
@click.option("--recipe-only", is_flag=True, help="print the recipe as it would be carried out: nothing is merged")
@execution_options
def run_command(
    recipes: tuple[Path, ...], settings: tuple[str, ...], lenient: bool, recipe_only: bool, execution: Execution
) -> None:
    """Carry out each RECIPE: YAML with models, method and parameters, as --recipe-only prints it, or one of mergekit.

    \b
    merge run recipe.yml -o merged/
    merge run recipe.yml --set scale=0.5 --set models.1=other/ --dry-run
    merge run one.yml two.yml three.yml -o merged/
    merge run mergekit_config.yml --recipe-only
    merge run - < recipe.yml

    Of several recipes, NAME.yml writes NAME in the folder of -o, and the settings change all. All are checked first.

    Relative paths in a recipe are relative to its folder, in a recipe from standard input (-) or a pipe and in --set to
    the working folder. Values of --set are YAML.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.plan.recipe_settings import parse_setting

        changes = [parse_setting(text) for text in settings]
        if len(recipes) > 1:
            if recipe_only:
                raise Refusal("--recipe-only prints one recipe: name one", "option")
            run_several(recipes, changes, execution, status, typed=settings, lenient=lenient)
            return
        (recipe,) = recipes
        loaded = load_source(recipe, changes, lenient)
        echo_notices(loaded.notices)
        loaded.check_counts()
        if recipe_only:
            echo_text(loaded.recipe.to_yaml().removesuffix("\n"))
        else:
            loaded.check_paths()
            with loaded.name_lines():
                execute(loaded.recipe, execution, status, settings)
