"""The sources of recipes on the command line: files, pipes and standard input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from merging.plan.recipe_files import LoadedRecipe
    from merging.plan.recipe_settings import Setting

__all__ = ["is_stream", "load_source"]


def load_source(path: Path, settings: list[Setting], lenient: bool) -> LoadedRecipe:
    """Read a recipe from a file, a pipe or standard input. Raises :class:`~merging.errors.MergingError`."""
    from merging.plan.recipe_files import parse_recipe, read_recipe
    from merging.sources.small_files import RECIPE_LIMIT, decode_text

    if not is_stream(path):
        return read_recipe(path, settings, lenient=lenient)
    name = "standard input" if str(path) == "-" else str(path)
    with click.open_file(str(path), "rb") as stream:
        content = stream.read(RECIPE_LIMIT + 1)
    return parse_recipe(decode_text(content, name, RECIPE_LIMIT), name, settings, lenient=lenient)


def is_stream(path: Path) -> bool:
    """Return whether a path is standard input or a pipe of the shell's, and so has no folder of its own.

    A pipe with another name is refused as a file: it may have no writer, for whom one would wait without end.
    """
    return str(path) == "-" or path.is_relative_to("/dev") or path.is_relative_to("/proc/self/fd")
