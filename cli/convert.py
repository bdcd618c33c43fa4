"""``merge convert``: write a recipe in another schema."""

from __future__ import annotations

import io
import os
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import handle_errors
from .options import debug_option, lenient_option, overwrite_option
from .output import echo, echo_notices, echo_text
from .recipe_source import load_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merging.plan.recipe import Recipe

__all__ = ["convert_command"]

_ENDINGS = (".yml", ".yaml", ".json")


@click.command(name="convert", short_help="write a recipe in another schema")
@click.argument("source", metavar="SOURCE")
@click.option(
    "--to", type=click.Choice(["merging", "mergekit"]), default="merging", show_default=True, help="schema to write"
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="a file, instead of the screen")
@overwrite_option
@lenient_option
@debug_option
def convert_command(source: str, to: str, output: Path | None, overwrite: bool, lenient: bool, debug: bool) -> None:
    """Write the recipe of SOURCE in our schema or in mergekit's.

    \b
    merge convert mergekit.yml -o ours.yml
    merge convert ours.yml --to mergekit
    merge convert "merge --method ties --base base/ one/ two/" --to mergekit
    merge convert merged/ -o recipe.yml

    SOURCE is a recipe of either schema (- for standard input), an output that states its recipe, a model card
    (README.md), or a command line in quotes. A recipe for mergekit is read back and compared: what mergekit cannot say
    is refused by name. Relative paths are relative to the working folder, in a file in our schema to its folder.
    """
    with handle_errors(debug):
        recipe = _read_source(source, lenient)
        if to == "mergekit":
            from merging.plan.mergekit.conversion import to_mergekit

            text = to_mergekit(recipe)
        else:
            text = (_relative_to(recipe, output.parent) if output else recipe).to_yaml()
        if output is None:
            echo_text(text.removesuffix("\n"))
        else:
            from merging.report.page import write_whole

            write_whole(output, text.encode(), overwrite)
            echo(f"{output}: written in the schema of {to}")


def _read_source(source: str, lenient: bool) -> Recipe:
    """Return the recipe of a file, an output, a card or a command line."""
    path = Path(source)
    if source.startswith("merge ") and not path.exists():
        return _read_command(_split(source)[1:])
    if source == "-" or (source.endswith(_ENDINGS) and not path.is_dir()):
        if not path.exists() and source != "-":
            from merging.hub.address import no_such_path

            raise no_such_path(path)
        loaded = load_source(path, [], lenient)
        echo_notices(loaded.notices)
        return loaded.recipe
    from merging.api.recipe_records import read_record

    return read_record(source).recipe(lenient=lenient)


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        from merging.errors import OptionError

        raise OptionError(f"{command}: is no command line: {str(error).lower()}") from None


def _read_command(words: Sequence[str]) -> Recipe:
    """Return the recipe that a command line would carry out."""
    from merging.plan.recipe_files import parse_recipe

    group = click.get_current_context().find_root().command
    with redirect_stdout(io.StringIO()) as printed:
        group.main([*words, "--recipe-only"], "merge", standalone_mode=False)
    recipe = parse_recipe(printed.getvalue(), "the command line").recipe
    if any(word.partition("=")[0] == "--quantize" for word in words):  # errors name it, also where it means another
        return recipe.model_copy(update={"quantize": recipe.quantize})
    return recipe


def _relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the paths of its models relative to the folder of its file."""
    from merging.plan.recipe_values import make_recipe, map_names

    def move(name: str) -> str:
        local = Path(name).exists() and not Path(name).is_absolute() and "://" not in name
        return os.path.relpath(name, folder) if local else name

    return make_recipe(map_names(recipe.to_dict(), lambda name, _: move(name)), "convert")
